"""Tiny random models as folders: ours in two kinds (tied or not), and GPT-2, whose matrices lie the other way round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.model.io import load_model
from groundup.model.transformer import Transformer

VOCAB = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """qwen3 (tied), qwen2 (untied, with biases), gpt2 (Conv1D, tied): folders as transformers saves them."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    models = {
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False)),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
        ),
    }
    root = tmp_path_factory.mktemp("bases")
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stock(folders: dict[str, Path]) -> Callable[[str], Any]:
    """transformers' model of a folder."""

    def load(name: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32, local_files_only=True).eval()

    return load


@pytest.fixture
def ours(folders: dict[str, Path]) -> Callable[[str], Transformer]:
    """Our model of a folder."""
    return lambda name: load_model(folders[name])
