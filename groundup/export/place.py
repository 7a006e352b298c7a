"""Where does an export grow? Beside its place, under a name that nobody reads, until it is whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EFBIG, ENOSPC
from pathlib import Path

from safetensors import SafetensorError

from groundup.errors import UserError
from groundup.files import explain


def refuse_existing(output: Path) -> None:
    """UserError where something stands at `output` already: an export overwrites nothing."""
    if output.exists() or output.is_symlink():
        raise UserError(output, "exists already", "choose another --output, or remove it first")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A path beside `output` for one file or folder; it takes the name `output` when the block ends well.

    However else the block ends, nothing is left of it. UserError: a full disk, a folder that may not be written.
    """
    refuse_existing(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for path in [temporary] if temporary.is_file() else [p for p in temporary.rglob("*") if p.is_file()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        refuse_existing(output)
        temporary.replace(output)
    except (OSError, SafetensorError) as error:
        cause = _as_os_error(error)
        if cause.errno == EFBIG:
            raise UserError(output, "is larger than a file may be there", "choose another disk, or --quant") from error
        raise explain(cause, output) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _as_os_error(error: Exception) -> OSError:
    """The OSError behind an error of a writer that names none."""
    if isinstance(error, OSError):
        short_write = error.errno is None and "written" in str(error)  # numpy's tofile: "8 requested and 4 written"
        return OSError(ENOSPC, str(error)) if short_write else error
    code = re.search(r"os error (\d+)", str(error))  # how safetensors passes one on
    return OSError(int(code[1]) if code else 0, str(error))
