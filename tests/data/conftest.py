"""A small real tokenizer and a writer of small files, for all tests of the room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import sentences

from groundup.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(sentences(300, seed=9), vocab_size=400)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, rows) makes a jsonl file of dicts, or of texts, and returns its path."""

    def make(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        objects = [{"text": row} if isinstance(row, str) else row for row in rows]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects), encoding="utf-8")
        return str(path)

    return make
