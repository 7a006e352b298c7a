"""A step of single tokens on a GPU is hundreds of small kernels: record them once, launch them together (CUDA graphs).

A recording holds for its shapes and addresses. So there is one for every power of two of answers and of blocks a
sequence, each over tensors of its own that a step's values are copied into; rows that nobody asked for write to a
scratch block that no sequence has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from groundup.infer.paged import PagedRows
from groundup.model.transformer import Transformer

Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]


class DecodeGraphs:
    """record: turns a function without arguments into (run it again, the tensor that it then fills)."""

    def __init__(self, model: Transformer, scratch_block: int, record: Record | None = None) -> None:
        self.model, self.scratch, self.record = model, scratch_block, record or cuda_graph
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def hidden(self, ids_N: torch.Tensor, rows: PagedRows) -> torch.Tensor:
        """As Transformer.hidden over these rows, one token of each sequence; [N, D]."""
        size = _power_of_two(len(ids_N)), _power_of_two(rows.tables_SW.shape[1])
        if size not in self._recorded:
            self._recorded[size] = _Recorded(self.model, rows, *size, self.scratch, self.record)
        return self._recorded[size].run(ids_N, rows)


class _Recorded:
    def __init__(
        self, model: Transformer, rows: PagedRows, sequences: int, width: int, scratch: int, record: Record
    ) -> None:
        device, size = rows.tables_SW.device, rows.cache.block_size
        self.idle = {"ids": 0, "positions_N": 0, "slots_N": scratch * size, "lengths_N": 1, "tables_SW": scratch}
        self.rows = copy.copy(rows)
        self.rows.pieces = [(0, 1)] * sequences
        self.rows.sequence_N = torch.arange(sequences, dtype=torch.int32, device=device)
        self.ids = torch.zeros(sequences, dtype=torch.int64, device=device)
        for name in ("positions_N", "slots_N", "lengths_N"):
            setattr(self.rows, name, torch.zeros(sequences, dtype=getattr(rows, name).dtype, device=device))
        self.rows.tables_SW = torch.zeros(sequences, width, dtype=torch.int32, device=device)
        self._load(self.ids[:0], None)
        self.replay, self.out_ND = record(lambda: model.hidden(self.ids[None], cache=self.rows)[0])

    def run(self, ids_N: torch.Tensor, rows: PagedRows) -> torch.Tensor:
        self._load(ids_N, rows)
        self.replay()
        return self.out_ND[: len(ids_N)].clone()

    def _load(self, ids_N: torch.Tensor, rows: PagedRows | None) -> None:
        self.ids.fill_(self.idle["ids"])[: len(ids_N)] = ids_N
        for name in ("positions_N", "slots_N", "lengths_N"):
            static = getattr(self.rows, name).fill_(self.idle[name])
            if rows is not None:
                static[: len(ids_N)] = getattr(rows, name)
        self.rows.tables_SW.fill_(self.idle["tables_SW"])
        if rows is not None:
            self.rows.tables_SW[: len(ids_N), : rows.tables_SW.shape[1]] = rows.tables_SW


def cuda_graph(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Record the kernels of a function on the current GPU; run once before, so that nothing lazy is recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
