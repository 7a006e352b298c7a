"""A small real tokenizer and writers of small files, for all tests of the room."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groundup.tokenizer import Tokenizer, train_tokenizer

WORDS = "the cat sat on a mat and saw one bird 猫 坐 在 垫子 上 看 鸟 飞 过 了".split()


def sentences(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 1 to `longest` words, most of them short."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=1 + int(longest * rng.random() ** 3))) + f" {i}." for i in range(count)]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


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
