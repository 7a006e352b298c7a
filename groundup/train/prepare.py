"""What is put around a model from outside? Recomputation, then compilation; the data axis (dist/ddp.py) comes last."""

from __future__ import annotations

import functools
import os

from torch import nn
from torch.utils.checkpoint import checkpoint

from groundup.device import CompilePolicy
from groundup.model.config import ModelConfig, num_parameters
from groundup.train.folder import cache_folder


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Keep only each block's input in the forward pass and compute its inside again in the backward pass.

    Memory falls from all activations to one block's, for about a third more work (Chen et al. 2016).
    """
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(blocks: nn.ModuleList, policy: CompilePolicy) -> None:
    """Compile the repeated block, once for all layers; parameter names stay as they are. The code is kept on disk."""
    if policy.on:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        for block in blocks:
            block.compile()


class Flops:
    """Floating-point operations of training: forward and backward, 6 a weight and token, and causal attention's."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        head = config.vocab_size * config.hidden_size
        trunk = num_parameters(config) - head * (1 if config.tie_word_embeddings else 2)
        attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
        self.per_token = 6 * (trunk + attention)
        self.per_label = 6 * head  # the head reads trained positions only

    def __call__(self, tokens: float, labels: float) -> float:
        return self.per_token * tokens + self.per_label * labels
