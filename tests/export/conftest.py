from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
from export_models import FAMILIES, make_model

from groundup.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "Mia lives in the blue house by the river. Her brother Tom has three cats and 12 hens, doesn't he?",
    "小明住在河边的蓝色房子里。他的姐姐有三只猫和12只鸡。今天天气很好，我们去公园吧。",
    "def add(a, b):\n    return a + b\n\n\nprint(add(3, 4))\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 5, 512)


@pytest.fixture(scope="session")
def model_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen3 with our tokenizer and template, as groundup trains them."""
    return make_model(tokenizer, tmp_path_factory.mktemp("models") / "Tiny Model", **FAMILIES["qwen3"])
