"""Padded completions laid out as training rows: behind prompts, several to a row, filler at the end, NaN between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FIXTURES = Path(__file__).parent / "fixtures"
PROMPT = 2  # positions before each completion


class Layout:
    """Where the completions of given lengths lie: as many rows as asked for, of `width` positions."""

    def __init__(self, lengths: list[int], rows: int = 2, width: int = 40) -> None:
        self.lengths, self.shape = lengths, (rows, width)
        self.doc_ids = torch.full((rows, width), -1, dtype=torch.int32)
        self.places: list[tuple[int, int]] = []
        share = -(-len(lengths) // rows)
        for number, length in enumerate(lengths):
            row, within = divmod(number, share)
            begin = 0 if not within else self.places[-1][1] + lengths[number - 1]
            self.doc_ids[row, begin : begin + PROMPT + length] = within
            self.places.append((row, begin + PROMPT))

    def pack(self, padded: Any, empty: float = float("nan")) -> torch.Tensor:
        """[completions, positions] values, or one value a completion, as [rows, width]; elsewhere `empty`."""
        padded = torch.as_tensor(padded)
        dtype = torch.float32 if padded.is_floating_point() else padded.dtype
        packed = torch.full(self.shape, empty if dtype.is_floating_point else 0, dtype=dtype)
        for values, length, (row, begin) in zip(padded, self.lengths, self.places, strict=True):
            packed[row, begin : begin + length] = values if values.dim() == 0 else values[:length]
        return packed

    def unpack(self, packed: torch.Tensor, width: int = 9) -> torch.Tensor:
        """Back to [completions, width], 0 behind their ends."""
        padded = torch.zeros(len(self.lengths), width)
        for number, (length, (row, begin)) in enumerate(zip(self.lengths, self.places, strict=True)):
            padded[number, :length] = packed[row, begin : begin + length]
        return padded
