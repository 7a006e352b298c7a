"""How does the engine answer with a model of transformers? Over the same pages where it can, else the long way round.

Its attention goes through model/foreign_attention.py into `PagedRows.attend`. Here is what our own models do not need:
windows, and doing without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from groundup.infer.scheduler import Work
    from groundup.model.transformer import Transformer


def windowed_attention(
    q_NHd: torch.Tensor,
    keys_PKSd: torch.Tensor,
    values_PKSd: torch.Tensor,
    tables_SW: torch.Tensor,
    pieces: Ids[tuple[int, int]],
    window: int,
) -> torch.Tensor:
    """As ops/paged.py, but a query sees only the last `window` tokens, itself among them; the others are not read."""
    out_NHd, at, size = torch.empty_like(q_NHd), 0, keys_PKSd.shape[2]
    grouped = q_NHd.shape[1] != keys_PKSd.shape[1]
    for row, (first, count) in enumerate(pieces):
        skipped, end = max(0, first + 1 - window) // size, first + count
        table_W = tables_SW[row, skipped : -(-end // size)].long()
        keys_1KLd, values_1KLd = (
            cache_PKSd[table_W].transpose(0, 1).flatten(1, 2)[None, :, : end - skipped * size]
            for cache_PKSd in (keys_PKSd, values_PKSd)
        )
        places_L = torch.arange(skipped * size, end, device=q_NHd.device)
        back_TL = torch.arange(first, end, device=q_NHd.device)[:, None] - places_L
        out_1HTd = F.scaled_dot_product_attention(
            q_NHd[at : at + count].transpose(0, 1)[None], keys_1KLd, values_1KLd,
            attn_mask=(back_TL >= 0) & (back_TL < window), enable_gqa=grouped,
        )  # fmt: skip
        out_NHd[at : at + count] = out_1HTd[0].transpose(0, 1)
        at += count
    return out_NHd


def recompute(model: Transformer, work: Ids[Work], device: torch.device) -> torch.Tensor:
    """Hidden states of all tokens of the work, [N, D], where nothing can be kept: every text from its beginning."""
    parts = []
    for item in work:
        text = item.sequence.ids + item.sequence.draft
        ids_1T = torch.tensor([text[: item.start] + item.tokens], device=device)
        parts.append(model.hidden(ids_1T)[0, -len(item) :])
    return torch.cat(parts)
