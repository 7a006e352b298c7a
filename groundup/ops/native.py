"""C for what torch has no operator for: compiled once by the machine's own compiler, called through ctypes.

Sources stand in ops/csrc/, plain C with OpenMP, no headers of torch: a second to compile, any torch to run beside.
The library shares torch's pool of OpenMP threads, since the loader finds the runtime that torch has loaded already.
Every function has a plain torch twin that is used where there is no compiler, and that the tests hold it against.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-std=gnu11")


@functools.cache
def native(name: str) -> ctypes.CDLL | None:
    """The library of ops/csrc/<name>.c, or None where it cannot be built (said once). GROUNDUP_NATIVE=0 turns it off.

    Kept on disk by the content of the source, the flags and the processor: one machine's code never runs on another.
    """
    if os.environ.get("GROUNDUP_NATIVE") == "0" or platform.system() != "Linux":
        return None
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        warnings.warn("no C compiler: plain torch operators answer instead, more slowly", stacklevel=2)
        return None
    source = SOURCES / f"{name}.c"
    key = hashlib.sha256("\0".join([source.read_text(), *FLAGS, compiler, _processor()]).encode()).hexdigest()[:16]
    library = _cache() / f"{name}-{key}.so"
    try:
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"{source.name} does not compile here, plain torch answers instead: {detail[:200]}", stacklevel=2)
        return None


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first number, for a C argument; NULL for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Compile beside the target and rename: two processes that start together do not meet a half-written library.

    Linked by a step of its own without -ffast-math, which would switch off denormal numbers in the whole process.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unit, linked = Path(folder) / "unit.o", Path(folder) / "linked.so"
        for command in (
            [*FLAGS, "-c", str(source), "-o", str(unit)],
            ["-shared", "-fopenmp", str(unit), "-o", str(linked), "-lm"],
        ):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True)
        linked.replace(library)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundup" / "native"


def _processor() -> str:
    """What -march=native sees: model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in wanted)
