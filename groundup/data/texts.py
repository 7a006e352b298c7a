"""Plain text out of files of any format, and the tokenizer that is learned from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from groundup.data.language import language
from groundup.data.read import read_rows
from groundup.data.rows import row_text
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer, load_tokenizer, report, train_tokenizer
from groundup.tokenizer.extend import extend_tokenizer

_REPORTED = 500  # texts of each language that the report measures
_HELD_OUT = 20  # every so manieth text is not learned from


def texts(paths: Sequence[str | Path]) -> Iterator[str]:
    """The readable text of every row, file after file, in the memory of one row. UserError at a bad row."""
    return (row_text(row) for path in paths for row in read_rows(path))


def train_tokenizer_on(paths: Sequence[str | Path], vocab_size: int, output: str | Path) -> dict[str, Any]:
    """Train a tokenizer on files and save it to `output`.

    Returns {output, vocab_size, languages: {language: characters and bytes per token, ...}}.
    """
    tokenizer = train_tokenizer(texts(paths), vocab_size)
    tokenizer.save(output)
    sample: dict[str, list[str]] = defaultdict(list)
    for text in texts(paths):
        kept = sample[language(text)]
        if len(kept) < _REPORTED:
            kept.append(text)
    measured = report(tokenizer, sample)
    return {"output": str(output), "vocab_size": tokenizer.vocab_size, "languages": measured}


def extend_tokenizer_on(
    base: str | Path, paths: Sequence[str | Path], add: int, output: str | Path, control: Sequence[str | Path] = ()
) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """Add pieces learned from files to the tokenizer of a folder, and save it to `output`: groundup tokenizer extend.

    Every twentieth text is held out, and measured (of fewer texts all are). control: files of what it knew before.
    Returns ({output, vocab_size, added, new_text, control}, new id -> the ids that spelled it before), a measure being
    tokens a character and a byte, before and after. UserError: a base that cannot be extended, an output in use.
    """
    if any((Path(output) / name).exists() for name in ("tokenizer.json", "config.json")):
        raise UserError(output, "holds a tokenizer or a model already", "choose another output")
    old = load_tokenizer(base)
    extended = extend_tokenizer(old, (t for i, t in enumerate(texts(paths)) if (i + 1) % _HELD_OUT), add)
    new = extended.tokenizer
    new.save(output)
    held_out = [t for i, t in zip(range(_REPORTED * _HELD_OUT), texts(paths), strict=False) if not (i + 1) % _HELD_OUT]
    summary: dict[str, Any] = {"output": str(output), "vocab_size": new.vocab_size, "added": len(extended.pieces)}
    summary["new_text"] = _before_and_after(old, new, held_out or list(texts(paths)))
    if control:
        known = [text for text, _ in zip(texts(control), range(_REPORTED), strict=False)]
        summary["control"] = _before_and_after(old, new, known)
    return summary, extended.pieces


def _before_and_after(old: Tokenizer, new: Tokenizer, sample: list[str]) -> dict[str, Any]:
    measured = {}
    for name, tokenizer in (("before", old), ("after", new)):
        found = report(tokenizer, {"": sample})[""]
        measured[name] = {
            "tokens_per_character": round(found["tokens"] / max(found["characters"], 1), 4),
            "tokens_per_byte": round(found["tokens"] / max(found["bytes"], 1), 4),
            "round_trip_failures": found["round_trip_failures"],
        }
    return {"texts": len(sample), **measured}
