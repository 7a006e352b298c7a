"""Sums, means and last tokens of the documents that share packed rows: one figure a sequence, without padding.

Documents are numbered through the batch, row by row, in the order in which they stand there; filler belongs to none.
So the D figures of a batch of pairs are chosen, rejected, chosen, rejected ...: `[0::2]` and `[1::2]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Documents:
    """Where the documents of a batch are. doc_ids_BT: as in a Batch, negative in filler. number: how many, D.

    index_BT: each token's document, D in filler. A document without a single masked-in token has sum 0, mean 0,
    last -1. Values that the mask leaves out are not looked at: they may be NaN, and get no gradient.
    """

    def __init__(self, doc_ids_BT: Tensor) -> None:
        starts_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
        starts_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
        filler_BT = doc_ids_BT < 0
        starts_BT &= ~filler_BT
        self.number = int(starts_BT.sum())
        self.index_BT = (starts_BT.flatten().cumsum(0).view_as(doc_ids_BT) - 1).masked_fill(filler_BT, self.number)

    def sum(self, values_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """sums_D, in at least fp32, of the values where mask_BT is not 0. Added up in fp64: thousands of tokens may be
        many, and what matters is the difference of two such sums."""
        dtype = torch.float64 if values_BT.dtype == torch.float64 else torch.float32
        wide_BT = values_BT.to(dtype if values_BT.device.type == "mps" else torch.float64)  # which has no fp64
        if mask_BT is not None:
            wide_BT = torch.where(mask_BT.bool(), wide_BT, 0.0)
        sums = wide_BT.new_zeros(self.number + 1)
        return sums.index_add(0, self.index_BT.flatten(), wide_BT.flatten())[: self.number].to(dtype)

    def count(self, mask_BT: Tensor) -> Tensor:
        """counts_D: tokens of each document where mask_BT is not 0."""
        return self.sum(mask_BT.bool())

    def mean(self, values_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.sum(values_BT, mask_BT) / self.count(mask_BT).clamp(min=1)

    def last(self, mask_BT: Tensor) -> Tensor:
        """last_D: the place, in the flattened batch, of each document's last token where mask_BT is not 0, or -1."""
        flat = self.index_BT.flatten()
        places = torch.arange(len(flat), device=flat.device).masked_fill(~mask_BT.bool().flatten(), -1)
        last = places.new_full((self.number + 1,), -1)
        return last.scatter_reduce(0, flat, places, "amax")[: self.number]

    def spread(self, values_D: Tensor) -> Tensor:
        """values_BT: to each token its document's value, 0 in filler."""
        return torch.cat([values_D, values_D.new_zeros(1)])[self.index_BT]


def per_document(values_BT: Tensor, doc_ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """sums_D of values over each document (its log probability, from those of its tokens)."""
    return Documents(doc_ids_BT).sum(values_BT, mask_BT)
