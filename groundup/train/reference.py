"""What did the policy begin as? Its reference: a frozen copy, the base below its adapter, or what they said, on disk.

Dropout is off in both: the policy would differ from its reference by chance.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundup.config import Recipe
from groundup.data.batch import PackedDataset
from groundup.data.shards import TokenShards
from groundup.device import autocast
from groundup.errors import UserError
from groundup.files import write_atomic
from groundup.model.transformer import Transformer
from groundup.objectives.documents import per_document
from groundup.ops.loss import selective_logprobs
from groundup.train.stage import Place
from groundup.train.start import Start, fingerprint

Reference: TypeAlias = "Callable[[], AbstractContextManager[nn.Module]]"  # `with reference() as model:`
VERSION = 1  # of what is kept on disk; part of its name
ROUND = 64  # batches between two writes of what was computed so far

log = logging.getLogger(__name__)


class Packed(Protocol):
    """Rows with labels, as a Batch has them and what is like one."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    doc_ids_BT: Tensor


def reference_of(begun: Start, how: Literal["copy", "adapter", "start"], half: torch.dtype) -> Reference:
    """The model as it is now, before training, to be had at any time later. half: the type of products.

    adapter: by switching it off, so without a second model. start: itself, as long as nothing has moved.
    """
    if how == "start":
        return lambda: nullcontext(begun.model)
    if how == "adapter":
        assert begun.adapted is not None
        begun.adapted.keep_start()
        return begun.adapted.off
    frozen = frozen_copy(begun.model, half)
    return lambda: nullcontext(frozen)


def frozen_copy(model: Any, half: torch.dtype = torch.float32) -> Any:
    """A second model of the same numbers, in eval mode. What does not move in the first one is shared with it.

    Its parameters say that they want gradients where the first one's do, so that the same kernels compute both, to the
    same bits: call it under no_grad. half: in which the blocks' matrices are kept, as products would cast them anyway.
    """
    shared = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    known = {id(tensor): tensor for tensor in shared}
    copied = copy.deepcopy(model, dict(known)).eval()
    for layer in copied.blocks.modules():
        if type(layer) is nn.Linear and id(layer.weight) not in known:
            layer.weight.data = layer.weight.data.to(half)
    return copied


def without_dropout(model: nn.Module) -> nn.Module:
    """Turn off whatever drops at random: modules, and the rates that transformers' layers keep under such names."""
    dropped = 0.0
    for module in model.modules():
        for name, value in list(vars(module).items()):
            rate = isinstance(value, float) and value > 0
            if rate and ("dropout" in name or "layerdrop" in name or (isinstance(module, nn.Dropout) and name == "p")):
                setattr(module, name, 0.0)
                dropped = max(dropped, value)
    if dropped:
        log.warning("the model's dropout (up to %s) is off at this stage", dropped)
    return model


def refuse_dropout(recipe: Recipe) -> None:
    if recipe.adapt.dropout:
        why = f"the policy would differ from its reference by chance, so stage {recipe.stage} trains without dropout"
        raise UserError("adapt.dropout", why, "leave it at 0")


def token_logps(model: nn.Module, batch: Packed, temperature: float = 1.0) -> Tensor:
    """log p of each labelled token, [B, T] fp32, 0 elsewhere; no logits are kept."""
    decoder = cast(Transformer, model)
    hidden_BTD = decoder.hidden(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
    return selective_logprobs(hidden_BTD, decoder.head_weight, batch.labels_BT, temperature=temperature)


def answer_logps(model: nn.Module, batch: Packed) -> Tensor:
    """log p of the labelled tokens of each document, summed, in the order in which documents stand in the batch."""
    return per_document(token_logps(model, batch), batch.doc_ids_BT)


class Kept:
    """The reference's log probabilities of all answers of a data set, computed once: float32 files beside the tokens.

    key: of whatever decides them beside the tokens. A file holds a number for each document of its shard, NaN where
    none was needed yet; a run that was killed while it computed goes on.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.known: dict[Path, NDArray[np.float32]] = {}

    @classmethod
    def of(cls, recipe: Recipe, source: Path, half: torch.dtype) -> Kept:
        """For the model of a folder as a recipe's adapter leaves it frozen."""
        adapt = recipe.adapt
        parts: list[Any] = [VERSION, fingerprint(source), (source / "config.json").read_bytes(), str(half)]
        parts += [adapt.base, adapt.double_quant if adapt.base == "nf4" else None]
        return cls(hashlib.blake2b(repr(parts).encode(), digest_size=10).hexdigest())

    def look_up(self, data: PackedDataset, rows: NDArray[np.integer]) -> Tensor:
        """Of each document in these rows, in their order."""
        _, shards, numbers = data.documents_of(rows)
        values = np.empty(len(numbers), np.float32)
        for one in np.unique(shards):
            values[shards == one] = self.known[data.shards[one].path][numbers[shards == one]]
        return torch.from_numpy(values)

    def complete(self, data: PackedDataset, reference: Reference, place: Place, half: torch.dtype, size: int) -> None:
        """Compute what is not known yet, `size` rows at a time, shared among the ranks. All of them must call."""
        for shards in data.shards:
            if shards.path not in self.known:
                own = self._read(shards) if place.world.main else None
                self.known[shards.path] = cast(NDArray[np.float32], place.world.gather_objects(own)[0])
        every = np.arange(len(data))
        rows = np.unique(data.documents_of(every)[0][self.look_up(data, every).isnan().numpy()])
        if len(rows) and place.world.main:
            log.warning("computing the reference's log probabilities of %d rows, once", len(rows))
        step = size * ROUND * place.world.size
        for begin in range(0, len(rows), step):
            share = rows[begin : begin + step][place.world.rank :: place.world.size]
            found = [
                self._compute(data, share[i : i + size], reference, place, half) for i in range(0, len(share), size)
            ]
            for part in (part for parts in place.world.gather_objects(found) for part in parts):
                self._take(data, *part)
            if place.world.main:
                for path in {shards.path for shards in data.shards}:
                    write_atomic(self._file(path), self.known[path].tobytes())

    def _compute(
        self, data: PackedDataset, rows: NDArray[np.integer], reference: Reference, place: Place, half: torch.dtype
    ) -> tuple[Any, Any, NDArray[np.float32]]:
        """(shard, number in it, log probability) of the documents of these rows."""
        with torch.no_grad(), autocast(place.device, half), reference() as model:
            logps_D = answer_logps(model, data.batch(rows).to(place.device))
        return *data.documents_of(rows)[1:], logps_D.float().cpu().numpy()

    def _take(self, data: PackedDataset, shards: Any, numbers: Any, values: NDArray[np.float32]) -> None:
        for one in np.unique(shards):
            self.known[data.shards[one].path][numbers[shards == one]] = values[shards == one]

    def _read(self, shards: TokenShards) -> NDArray[np.float32]:
        path = self._file(shards.path)
        values = np.fromfile(path, np.float32) if path.is_file() else np.zeros(0, np.float32)
        return values if len(values) == len(shards) else np.full(len(shards), np.nan, np.float32)

    def _file(self, folder: Path) -> Path:
        return folder / f"reference-{self.key}.bin"
