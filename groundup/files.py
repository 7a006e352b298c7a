"""Writing files so that a reader, or a run that starts again, never meets half of one."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from groundup.errors import UserError


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a temporary neighbour, flush it to disk, rename it: the old content stands until the new one is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise explain(error, path) from error


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of readable JSON."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, default=str) + "\n")


def explain(error: OSError, path: str | Path) -> Exception:
    """A full disk, a read-only folder or a file in the way as a UserError; anything else as it came."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(path, "the disk is full", "free some space and give the same command again: nothing was lost")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(path, "may not be written", "choose another output folder, or mend its permissions")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(path, "a file stands where a folder is needed", "choose another output folder")
    return error
