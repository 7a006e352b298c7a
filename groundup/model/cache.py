"""What does the model remember while it writes? Keys and values of every layer, in one allocation a layer.

Rows may have different lengths and never need left padding: a row's tokens always start at slot 0. A ragged batch of
prompts is padded on the right, run once, and cut back with `truncate`; what lies beyond a row's length is invisible
and is overwritten by the next tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.ops.attention import attention


class Cache(Protocol):
    """What the model asks of a memory: KVCache below, and infer/paged.py's for many requests at once."""

    def start(self, new_tokens: int) -> tuple[torch.Tensor, Any]:
        """(position_ids_BT, mask) of `new_tokens` more in each row."""

    def attend(
        self, layer: int, q_BTHd: torch.Tensor, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """Remember a layer's new keys and values, and answer its queries over all so far: [B, T, H, d]."""

    def advance(self, new_tokens: int) -> None:
        """Count `new_tokens` as held, once every layer has them (the model calls this)."""


class KVCache:
    """Static key/value memory: keys, values [layers, B, S, K, d], and a length a row.

    lengths: tokens that each row holds; `forward(..., cache=cache)` appends T tokens to every row.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, max_len, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size
        self.max_len = max_len

    def start(self, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(position_ids_BT, mask) for `new_tokens` more in each row. mask None: plain causal.

        Raises UserError when a row would outgrow the cache.
        """
        end = max(self.lengths) + new_tokens
        if end > self.max_len:
            raise UserError("context", f"{end} tokens do not fit the cache of {self.max_len}", "raise its max_len")
        lengths_B1 = torch.tensor(self.lengths, device=self.keys.device)[:, None]
        positions_BT = lengths_B1 + torch.arange(new_tokens, device=self.keys.device)
        if not any(self.lengths):
            return positions_BT, None
        slots_S = torch.arange(end, device=self.keys.device)
        return positions_BT, (slots_S <= positions_BT[..., None])[:, None]

    def append(self, layer: int, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values after each row's tokens; all its keys and values so far, [B, S, K, d]."""
        new = k_BTKd.shape[1]
        end = max(self.lengths) + new
        for buffer, fresh in ((self.keys[layer], k_BTKd), (self.values[layer], v_BTKd)):
            if len(set(self.lengths)) == 1:
                buffer[:, end - new : end] = fresh
            else:
                for row, length in enumerate(self.lengths):
                    buffer[row, length : length + new] = fresh[row]
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def attend(
        self,
        layer: int,
        q_BTHd: torch.Tensor,
        k_BTKd: torch.Tensor,
        v_BTKd: torch.Tensor,
        mask: Any,
        window: int | None = None,
    ) -> torch.Tensor:
        keys, values = self.append(layer, k_BTKd, v_BTKd)
        if window is not None:
            mask = near(self.start(k_BTKd.shape[1])[0], keys.shape[1], window)
        return attention(q_BTHd, keys, values, mask)

    def advance(self, new_tokens: int) -> None:
        self.lengths = [length + new_tokens for length in self.lengths]

    def truncate(self, lengths: list[int]) -> None:
        """Forget all but each row's first tokens: right padding after a ragged prefill, or rejected drafts."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot lengthen a cache from {self.lengths} to {lengths}")
        self.lengths = list(lengths)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order (drop finished ones, reorder or repeat beams)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = [self.lengths[row] for row in rows]


def near(position_ids_BT: torch.Tensor, slots: int, window: int) -> torch.Tensor:
    """Bool mask [B, 1, T, S]: a token sees itself and the window - 1 before it."""
    back_BTS = position_ids_BT[..., None] - torch.arange(slots, device=position_ids_BT.device)
    return ((back_BTS >= 0) & (back_BTS < window))[:, None]
