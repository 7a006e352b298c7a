from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

from groundup.model.config import ModelConfig
from groundup.model.io import load_model, save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock folder of a random model with a short context."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["The cat sat on the mat. 小猫坐在垫子上，看着月亮。"] * 20, 400)
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=160,
        )
    )
    model.init_weights(0)
    save_model(model, path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def model(folder: Path) -> Transformer:
    return load_model(folder)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)
