"""What is computed? Token ids in, a score for every possible next token out.

Open this first: embed, the blocks (block.py: attention.py, ffn.py), a last norm, the head. Module names are Hugging
Face's, so a state dict is a stock checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from groundup.model.block import Block
from groundup.model.cache import Cache
from groundup.model.config import ModelConfig
from groundup.model.fast import FastRows, can_be_fast
from groundup.model.norm import RMSNorm
from groundup.model.prefix import Prefixed, SoftPrefix
from groundup.model.rope import rope_frequencies, rope_table
from groundup.model.rows import Rows
from groundup.ops.attention import Documents, document_mask


class Trunk(nn.Module):
    """The parameters that Hugging Face files under `model.`"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """soft_prefix: stands before every document (prefix.py); no parameter, so neither saved nor moved."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.soft_prefix: SoftPrefix | None = None
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers: what activation checkpointing, compile and sharding wrap from outside."""
        return self.model.layers

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D]: the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        seen: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm, [B, T, D]: feed them with `head_weight` to linear_cross_entropy.

        doc_ids_BT: packed rows; tokens of different documents do not see each other. cache: these T tokens come
        after those that it holds, the soft prefix among them, and are appended to it. seen: is given what went into
        each layer, and what came out of the last.
        """
        if self.soft_prefix is not None and cache is None:
            cache = Prefixed(self.soft_prefix, input_ids_BT, position_ids_BT, doc_ids_BT)
            position_ids_BT = doc_ids_BT = None
        return self.run(self.model.embed_tokens(input_ids_BT), position_ids_BT, doc_ids_BT, cache, seen)

    def run(
        self,
        x_BTD: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        seen: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`hidden`, from embeddings: those of tokens, or learnt ones."""
        rows = self._rows(x_BTD, position_ids_BT, doc_ids_BT, cache)
        for block in self.blocks:
            if seen is not None:
                seen.append(x_BTD)
            x_BTD = block(x_BTD, rows)
        if seen is not None:
            seen.append(x_BTD)
        if cache is not None:
            cache.advance(x_BTD.shape[1])
        return self.model.norm(x_BTD)

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V]. Arguments as `hidden`."""
        return F.linear(self.hidden(input_ids_BT, position_ids_BT, doc_ids_BT, cache), self.head_weight)

    def init_weights(self, seed: int) -> None:
        """Fresh weights from a seed, the same on every device and rank.

        Embeddings: normal, initializer_range (0.02; logits of a tied model start near 0). Matrices: normal with
        std 1 / sqrt(fan_in), so that a normalised input stays at size 1 whatever the width. Output projections
        (o_proj, down_proj) start at zero: every block starts as the identity, and depth costs no stability
        (Fixup, arXiv 1901.09321; muP practice). Norms 1, biases 0.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.ndim == 1:
                    parameter.fill_(1.0 if "norm" in name else 0.0)
                elif name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
                else:
                    std = parameter.shape[1] ** -0.5
                    if "embed" in name or "lm_head" in name:
                        std = self.config.initializer_range
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def compile_blocks(self) -> None:
        """torch.compile the block, once for all layers: they share code and shapes. Names of parameters stay."""
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    def _rows(
        self,
        x_BTD: torch.Tensor,
        position_ids_BT: torch.Tensor | None,
        doc_ids_BT: torch.Tensor | None,
        cache: Cache | None,
    ) -> Rows:
        device, (rows, length, _) = x_BTD.device, x_BTD.shape
        if cache is not None:
            cached_positions_BT, mask = cache.start(length)
            position_ids_BT = cached_positions_BT if position_ids_BT is None else position_ids_BT
            return Rows(rope_table(*self._frequencies(device), position_ids_BT), mask, cache)
        if position_ids_BT is None:
            position_ids_BT = torch.arange(length, device=device)[None]
        rope = rope_table(*self._frequencies(device), position_ids_BT)
        mask = document_mask((rows, length), doc_ids_BT, device)
        if isinstance(mask, Documents) and can_be_fast(self.blocks, self.config, device, rows * length):
            turns_BTp = torch.complex(*rope)
            return Rows(rope, mask, fast=FastRows(turns_BTp.expand(rows, -1, -1), mask.doc_ids_BT))
        return Rows(rope, mask)

    def _frequencies(self, device: torch.device) -> tuple[torch.Tensor, float]:
        """RoPE's angles a position; not a buffer, so that no cast or checkpoint ever touches them."""
        cached = self.__dict__.get("_rope")
        if cached is None or cached[0].device != device:
            inv_freq, factor = rope_frequencies(self.config)
            cached = self.__dict__["_rope"] = (inv_freq.to(device), factor)
        return cached
