"""What does the model remember of many sequences at once? Blocks of keys and values, and how one batch lies in them.

A batch is one row of N tokens: pieces of prompts and single tokens of running answers, side by side, no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from groundup.infer.adapters import Rows
from groundup.infer.foreign import windowed_attention
from groundup.model.config import ModelConfig
from groundup.ops.paged import paged_attention


class PagedCache:
    """keys, values [layers, P, K, size, d]. Memory is touched when a block is first written, not before."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.block_size = block_size

    def copy(self, source: int, target: int) -> None:
        if not self.keys.shape[1]:  # of a model that cannot be computed over a cache (foreign.py)
            return
        for cache in (self.keys, self.values):
            cache[:, target] = cache[:, source]

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * block_size * config.head_dim
        return numbers * dtype.itemsize


class PagedRows:
    """One batch, as `Transformer.hidden(ids_1N, cache=...)` takes a cache.

    starts, counts: each sequence's first uncomputed token and how many follow; tables: its blocks. adapters: whose
    rows they answer (adapters.py).
    """

    def __init__(
        self,
        cache: PagedCache,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        adapters: Rows = (),
    ) -> None:
        device, size = cache.keys.device, cache.block_size
        self.cache, self.adapters = cache, adapters
        width = max(map(len, tables))
        padded = [[*table, *[0] * (width - len(table))] for table in tables]
        self.tables_SW = torch.tensor(padded, dtype=torch.int32, device=device)
        positions = [at for start, count in zip(starts, counts, strict=True) for at in range(start, start + count)]
        owners = [row for row, count in enumerate(counts) for _ in range(count)]
        slots = [tables[row][at // size] * size + at % size for row, at in zip(owners, positions, strict=True)]
        self.positions_N = torch.tensor(positions, device=device)
        self.slots_N = torch.tensor(slots, device=device)
        self.sequence_N = torch.tensor(owners, dtype=torch.int32, device=device)
        self.lengths_N = torch.tensor(positions, dtype=torch.int32, device=device) + 1
        self.pieces = list(zip(starts, counts, strict=True))
        self.longest = max(positions, default=0) + 1

    def start(self, new_tokens: int) -> tuple[torch.Tensor, Any]:
        return self.positions_N[None], None

    def advance(self, new_tokens: int) -> None:
        """The scheduler counts."""

    def attend(
        self,
        layer: int,
        q_BTHd: torch.Tensor,
        k_BTKd: torch.Tensor,
        v_BTKd: torch.Tensor,
        mask: Any,
        window: int | None = None,
    ) -> torch.Tensor:
        """Remember the new keys and values, and answer the queries. window: tokens that each sees, itself counted."""
        block, place = self.slots_N // self.cache.block_size, self.slots_N % self.cache.block_size
        self.cache.keys[layer][block, :, place] = k_BTKd[0]
        self.cache.values[layer][block, :, place] = v_BTKd[0]
        if window is not None and self.longest > window:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            return windowed_attention(q_BTHd[0], keys, values, self.tables_SW, self.pieces, window)[None]
        return self.answer(layer, q_BTHd[0])[None]

    def answer(self, layer: int, q_NHd: torch.Tensor) -> torch.Tensor:
        """Attention of the batch's queries, their own keys and values being in the cache already. -> [N, H, d]"""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return paged_attention(q_NHd, keys, values, self.tables_SW, self.sequence_N, self.lengths_N, self.pieces)
