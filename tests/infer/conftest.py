from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["The cat sat on the mat. 小猫坐在垫子上，看着月亮。"] * 20, 400)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Transformer:
    """Random, with logits far enough apart that rounding decides no argmax."""
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
        )
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture(scope="session")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts of many lengths, 1 to 40 tokens, not in order."""
    generator = torch.Generator().manual_seed(1)
    lengths = [7, 1, 40, 12, 12, 3, 25, 2, 40, 19]
    return [torch.randint(5, tokenizer.vocab_size, (n,), generator=generator).tolist() for n in lengths]
