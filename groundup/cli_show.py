"""How is a result shown? As text for people, or as one JSON object."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text for people.")]


def show(result: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    """One JSON object on stdout, or the text (default: a key and value a line)."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, default=str))
    elif text is not None:
        print(text)
    else:
        for key, value in result.items():
            nested = isinstance(value, (dict, list))
            print(f"{key}: {json.dumps(value, ensure_ascii=False, default=str) if nested else value}")
