"""What survives a kill? Folders `checkpoints/step-N`, whole or not there at all.

A checkpoint is written beside its place, flushed to disk, marked (`COMPLETE`, with the size and hash of every file, is
written last) and only then renamed into place. Killed at any instant, the run finds its last whole one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.errors import UserError
from groundup.files import explain

MARKER, STATE = "COMPLETE", "state.json"
SLACK = 2**20  # headers, JSON, directory blocks
Files = dict[str, dict[str, Tensor]]  # {file name without ending: {tensor name: tensor}}


def write(root: Path, step: int, files: Files, state: dict[str, Any]) -> Path:
    """Write checkpoint `root/step-N`: one safetensors a file, and `state` as JSON.

    UserError where the disk is or becomes full: what stood there before still stands.
    """
    need = size(files)
    final, temporary = root / f"step-{step}", root / f".step-{step}.new"
    with disk_errors(final, need):
        root.mkdir(parents=True, exist_ok=True)
        check_space(final, need)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            for name, tensors in files.items():
                save_file(
                    {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors"
                )
            (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            marks = {path.name: _seal(path) for path in sorted(temporary.iterdir())}
            (temporary / MARKER).write_text(json.dumps(marks, indent=1), encoding="utf-8")
            _flush(temporary / MARKER)
            _flush(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if final.exists():
            if fault(final) is None:  # the same step of the same run: it holds the same
                shutil.rmtree(temporary)
                return final
            shutil.rmtree(final)
        temporary.replace(final)
        _flush(root)
    return final


def read(path: Path) -> tuple[Files, dict[str, Any]]:
    """The tensors and the state of a whole checkpoint, on the CPU."""
    files = {p.stem: load_file(p) for p in sorted(path.glob("*.safetensors"))}
    return files, json.loads((path / STATE).read_text(encoding="utf-8"))


def latest(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; None where there never was one. Damaged ones are named once and passed over.

    UserError where checkpoints are there and none of them is whole.
    """
    found = steps(root)
    for step in reversed(found):
        path = root / f"step-{step}"
        problem = fault(path)
        if problem is None:
            return path
        warn(f"{path}: {problem}; passed over, the one before is used")
    if found:
        raise UserError(root, "no checkpoint in it is whole", "remove the output folder to start from the beginning")
    return None


def fault(path: Path) -> str | None:
    """Why this checkpoint cannot be used, or None: every file must have the size and hash that its marker says."""
    try:
        marks = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"has no {MARKER} marker"
    except (OSError, ValueError) as error:
        return f"its {MARKER} marker cannot be read ({error})"
    for name, mark in marks.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != mark["size"]:
            return f"{name} has {file.stat().st_size} bytes of {mark['size']}"
        if _digest(file) != mark["sha256"]:
            return f"{name} is damaged"
    return None


def steps(root: Path) -> list[int]:
    """The steps that have a folder, in order."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in root.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def prune(root: Path, keep_last: int, upto: int, best: int | None = None) -> None:
    """Remove all but the `keep_last` newest checkpoints up to step `upto`, and the best one."""
    old = [step for step in steps(root) if step <= upto][:-keep_last]
    for step in old:
        if step != best:
            gone = root / f".step-{step}.old"
            (root / f"step-{step}").rename(gone)  # renamed first: a kill leaves no half of a checkpoint in place
            shutil.rmtree(gone, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what killed writes and removals left behind. Only for the process that holds the run's lock."""
    for path in root.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def size(files: Files) -> int:
    """Bytes that these tensors take on disk."""
    return sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values()) + SLACK


def check_space(path: Path, need: int) -> None:
    """UserError if the disk that holds `path` has less than `need` bytes free."""
    place = path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise _full(path, need, free)


@contextmanager
def disk_errors(path: Path, need: int) -> Iterator[None]:
    """A full disk or a forbidden folder, met while writing, as a UserError."""
    try:
        yield
    except SafetensorError as error:  # carries the system's error as text only
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise _explain(OSError(int(code[1]), str(error)), path, need) from error
    except OSError as error:
        raise _explain(error, path, need) from error


def _explain(error: OSError, path: Path, need: int) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _full(path, need, shutil.disk_usage(path.parent if path.parent.exists() else ".").free)
    return explain(error, path)


def _full(path: Path, need: int, free: int) -> UserError:
    return UserError(
        path, f"the disk is full: {need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free",
        "free some space and give the same command again: earlier checkpoints are intact",
    )  # fmt: skip


def _seal(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """fsync of a file, or of a folder where the system lets us (not on Windows)."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
