"""How much arithmetic does training need? What shares of peak and guesses of speed are reckoned from."""

from __future__ import annotations

from groundup.model.config import ModelConfig, num_parameters


class Flops:
    """Operations of (tokens, labels): 6 a weight and token, and causal attention over rows of seq_len.

    labels: how many of the tokens have a target; the head is computed for those alone.
    """

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        head = config.vocab_size * config.hidden_size
        trunk = num_parameters(config) - head * (1 if config.tie_word_embeddings else 2)
        attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
        self.per_token = 6 * (trunk + attention)
        self.per_label = 6 * head  # the head reads trained positions only

    def __call__(self, tokens: float, labels: float) -> float:
        return self.per_token * tokens + self.per_label * labels
