"""How much memory is free here? The container's limit counts, not only the machine's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device."""
    import psutil
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    left = cgroup_left(CGROUPS, _own_cgroup())
    available = psutil.virtual_memory().available
    return available if left is None else min(available, left)


def cgroup_left(root: Path, own: str = "") -> int | None:
    """Bytes left under the tightest memory limit of our cgroup and those above it (v2, then v1); None: no limit.

    Page cache that the kernel may drop (inactive_file) counts as free.
    """
    found = []
    for folder, limit_name, used_name in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        here = folder / own.strip("/")
        for level in (here, *here.parents):
            if level == folder.parent:
                break
            limit, used = _number(level / limit_name), _number(level / used_name)
            if limit is not None and used is not None and limit < 2**60:  # v1 spells "no limit" as a huge number
                found.append(max(0, limit - used + _reclaimable(level / "memory.stat")))
    return min(found, default=None)


def _own_cgroup() -> str:
    """Our place below the root, from /proc/self/cgroup: `0::/path` (v2) or `N:memory:/path` (v1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            return place
    return ""


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(stat: Path) -> int:
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
