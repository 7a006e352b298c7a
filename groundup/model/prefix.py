"""What stands before every document? A soft prompt: n virtual tokens, as the keys and values each layer has of them.

Virtual tokens see only each other, so their keys and values are the same whatever comes after. They are learnt as they
are, or found by running n learnt embeddings through the model once (`record`). A document behind them starts at
position n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from groundup.ops.attention import attention, visible

if TYPE_CHECKING:
    from groundup.model.transformer import Transformer

SoftPrefix = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer: keys (turned by RoPE) and values, [n, K, d]


def record(model: Transformer, x_nD: torch.Tensor) -> SoftPrefix:
    """The prefix of n embeddings, differentiable."""
    cache = _Recorder(x_nD.device)
    model.run(x_nD[None], cache=cache)
    return [cache.seen[layer] for layer in range(len(model.blocks))]


class _Recorder:
    """A cache that keeps what each layer gives it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def start(self, new_tokens: int) -> tuple[torch.Tensor, Any]:
        return torch.arange(new_tokens, device=self.device)[None], None

    def attend(
        self, layer: int, q_BTHd: torch.Tensor, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        self.seen[layer] = (k_BTKd[0], v_BTKd[0])
        return attention(q_BTHd, k_BTKd, v_BTKd, mask)

    def advance(self, new_tokens: int) -> None:
        """Nothing comes after."""


class Prefixed:
    """Rows behind a prefix, as `Transformer.hidden(input_ids, cache=...)` takes a cache: a token sees the prefix and
    what came before it in its own document. The other arguments of `hidden` are given here instead."""

    def __init__(
        self,
        prefix: SoftPrefix,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
    ) -> None:
        self.prefix, n = prefix, prefix_length(prefix)
        if position_ids_BT is None:
            position_ids_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)[None]
        if doc_ids_BT is None:
            doc_ids_BT = torch.zeros_like(input_ids_BT[:1])
        self.positions_BT = position_ids_BT + n
        self.mask_B1TS = F.pad(visible(doc_ids_BT), (n, 0), value=True)

    def start(self, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.positions_BT, self.mask_B1TS

    def attend(
        self, layer: int, q_BTHd: torch.Tensor, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        rows = len(k_BTKd)
        k_BSKd, v_BSKd = (
            torch.cat([before_nKd.to(own_BTKd.dtype).expand(rows, -1, -1, -1), own_BTKd], 1)
            for before_nKd, own_BTKd in zip(self.prefix[layer], (k_BTKd, v_BTKd), strict=True)
        )
        if q_BTHd.is_cuda:  # with a mask torch's lean kernel takes equal heads only, and the other keeps all scores
            group = q_BTHd.shape[2] // k_BSKd.shape[2]
            k_BSKd, v_BSKd = k_BSKd.repeat_interleave(group, 2), v_BSKd.repeat_interleave(group, 2)
        return attention(q_BTHd, k_BSKd, v_BSKd, mask)

    def advance(self, new_tokens: int) -> None:
        """The rows are whole."""


def prefix_length(prefix: SoftPrefix | None) -> int:
    """n; 0 where there is none."""
    return len(prefix[0][0]) if prefix else 0
