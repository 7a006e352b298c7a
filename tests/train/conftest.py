"""A micro world to train on: 300-entry tokenizer, a 20k-parameter model, a few hundred short rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import small_recipe

from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import train_tokenizer
from groundup.train.run import train

WORDS = "the cat sat on a mat and saw one red dog run far from home while 小猫 坐在 垫子 上".split()


def say(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tok/, model/ (micro, with its tokenizer), text.jsonl, chat.jsonl, cache/."""
    root, rng = tmp_path_factory.mktemp("ground"), random.Random(0)
    texts = [say(rng, 8, 40) for _ in range(160)]
    turns = [(say(rng, 2, 6), say(rng, 1, 20)) for _ in range(120)]  # answers of very different lengths
    chats = [{"conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    write_rows(root / "text.jsonl", [{"text": text} for text in texts])
    write_rows(root / "chat.jsonl", chats)
    tokenizer = train_tokenizer(texts, 320)
    tokenizer.save(root / "tok")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 2, 1, 32, max_position_embeddings=128))
    model.init_weights(0)
    save_model(model, root / "model")
    tokenizer.save(root / "model")
    return root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def recipe(ground: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """recipe(**{"train.steps": 3, "output": "b"}) -> a small pretraining recipe with these keys changed."""

    return lambda **changes: small_recipe(ground, tmp_path, **changes)


@pytest.fixture
def run() -> Callable[..., dict[str, Any]]:
    """train(), on one thread and without measuring the machine."""
    torch.set_num_threads(1)
    return lambda recipe, **options: train(recipe, peak=1e9, **options)
