"""Plain text out of files of any format, and the tokenizer that is learned from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from groundup.data.language import language
from groundup.data.read import read_rows
from groundup.data.rows import row_text
from groundup.tokenizer import report, train_tokenizer

_REPORTED = 500  # texts of each language that the report measures


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
