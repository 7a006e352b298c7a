"""The `gguf` package, which knows the file format and its quantised types: needed only when a GGUF is touched."""

from __future__ import annotations

from types import ModuleType

from groundup.errors import UserError


def gguf_package() -> ModuleType:
    """The imported package. UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("gguf", "the gguf package is not installed", 'pip install "groundup[gguf]"') from None
    return gguf
