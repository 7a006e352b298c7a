"""groundup: from raw text to a language model that talks.

`groundup.load_model(DIR)`, `groundup.load_tokenizer(DIR)`, `groundup.train(recipe)`. Importing groundup imports nothing
heavy; each of these brings what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from groundup import train  # the room of that name, which may be called: groundup.train(recipe)

if TYPE_CHECKING:
    from groundup.model.io import load_model
    from groundup.tokenizer import load_tokenizer

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "load_tokenizer", "train"]

_HOMES = {"load_model": "groundup.model.io", "load_tokenizer": "groundup.tokenizer"}


def __getattr__(name: str) -> Any:
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'groundup' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
