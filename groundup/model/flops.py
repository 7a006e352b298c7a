"""How much arithmetic does training need? What shares of peak and guesses of speed are reckoned from."""

from __future__ import annotations

from typing import Any

from torch import nn

from groundup.model.config import ModelConfig, num_parameters


class Flops:
    """Operations of (tokens, labels): 6 a weight and token, and causal attention over rows of seq_len.

    labels: how many of the tokens have a target; the head is computed for those alone.
    """

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        head = config.vocab_size * config.hidden_size
        trunk = num_parameters(config) - head * (1 if config.tie_word_embeddings else 2)
        attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
        self.per_token: float = 6 * (trunk + attention)
        self.per_label: float = 6 * head  # the head reads trained positions only

    @classmethod
    def of(cls, model: Any, seq_len: int) -> Flops:
        """Of a model as it stands, whoever computes it, with the part of it that moves.

        A weight costs 2 forward; 2 more where a gradient must pass it on the way to something that moves; 2 more where
        it moves itself. Below the lowest thing that moves nothing is differentiated.
        """
        config, blocks, head, lowest = model.config, list(model.blocks), model.head_weight, lowest_moving(model)
        attention = config.num_attention_heads * config.head_dim * seq_len
        flops = cls.__new__(cls)
        flops.per_token = 0.0
        for depth, block in enumerate(blocks):
            passed = 4 if depth >= lowest else 2
            flops.per_token += passed * _weights(block, config) + (6 if depth >= lowest else 2) * attention
            flops.per_token += 2 * _weights(block, config, moving_only=True)
        head_size = head.numel()
        flops.per_label = head_size * (2 + (2 if lowest < len(blocks) else 0) + (2 if head.requires_grad else 0))
        return flops

    def __call__(self, tokens: float, labels: float) -> float:
        return self.per_token * tokens + self.per_label * labels


def lowest_moving(model: Any) -> int:
    """The first block to which gradients go back; as many as there are, where nothing but the head moves."""
    blocks = list(model.blocks)
    inside = {id(p) for block in blocks for p in block.parameters()}
    head = next((m.weight for n, m in model.named_modules() if n.endswith(("lm_head", "embed_out", "score"))), None)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for p in model.parameters():  # norms aside, what is no block and no head comes before the first block
        if p.requires_grad and p.ndim > 1 and id(p) not in inside and (p is not head or id(p) in embeddings):
            return 0
    moving = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    return moving.index(True) if True in moving else len(blocks)


def _weights(block: nn.Module, config: Any, moving_only: bool = False) -> float:
    """Numbers in the matrices that a token meets in a block: quantised ones too; of experts those it is sent to."""
    stock = getattr(config, "stock", None)
    total = 0.0
    for name, part in block.named_modules():
        share = _share(stock) if ".experts" in f".{name}" else 1.0
        own = [p for p in part.parameters(recurse=False) if p.ndim > 1 and (p.requires_grad or not moving_only)]
        total += share * sum(p.numel() for p in own)
        if hasattr(part, "dequantize") and not moving_only:
            total += share * part.in_features * part.out_features
    return total


def _share(stock: Any) -> float:
    """Experts that a token is sent to, of all."""
    text = stock.get_text_config() if stock is not None else None
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
    return getattr(text, "num_experts_per_tok", 1) / experts if experts else 1.0
