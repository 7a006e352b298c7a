"""What is learned from one answer, and how do answers become rows? Packed like all rows, figures beside the ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundup.data.batch import IGNORE
from groundup.data.pack import pack
from groundup.ops.forks import BRANCH

COLUMNS = ("mask", "engine", "old", "reference", "values", "advantages", "returns")
WHOLE = {"cpu": 16, "cuda": 128}  # rows end behind their last token, at a multiple of this: FlexAttention wants 128


@dataclass
class Experience:
    """One answer. ids: prompt and answer; start: where the answer begins. columns: fp32 figures, one a token of it.

    number: of its prompt in the round, over all ranks. reward: NaN where nobody could tell.
    columns by name: mask (1 where the policy spoke), engine, old, reference (logprobs), values, advantages, returns.
    """

    number: int
    ids: list[int]
    start: int
    truncated: bool
    reward: float = float("nan")
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start


@dataclass
class RolloutBatch:
    """B packed rows of answers behind their prompts, as data/batch.Batch has them: figures stand where a label does.
    Where answers share their prompt, doc_ids_BT are those of ops/forks.py.

    labels_BT: the policy's own next token, else -100. engine, old, reference: its logprobs by the engine and by the
    trainer when it was sampled, and by the reference. least: added to the count where a whole step trains no token.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    doc_ids_BT: Tensor
    engine_BT: Tensor | None = None
    old_BT: Tensor | None = None
    reference_BT: Tensor | None = None
    values_BT: Tensor | None = None
    advantages_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    least: int = 0
    round: int = 0

    @property
    def mask_BT(self) -> Tensor:
        return self.labels_BT != IGNORE

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RolloutBatch:
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def each(self, change: Callable[[Tensor], Tensor]) -> RolloutBatch:
        """The batch with all its tensors changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(t) for name, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Spot:
    """Where an answer's labels stand: in this row, from this position on."""

    row: int
    begin: int


@dataclass(frozen=True)
class _Bundle:
    """Answers, by number, that stand behind one copy of the first `trunk` tokens of their prompt; alone, it is 0."""

    members: list[int]
    trunk: int = 0

    def length(self, experiences: Sequence[Experience]) -> int:
        return self.trunk + sum(len(experiences[i].ids) - self.trunk for i in self.members)


def pack_rows(
    experiences: Sequence[Experience], seq_len: int, pad_id: int, fork: bool = False
) -> tuple[RolloutBatch, list[Spot]]:
    """All answers in rows of seq_len tokens, and where each of them went. Without any: a row of filler.

    fork: a prompt's answers share it, as branches of one document (ops/forks.py). Its last token stands in every
    branch: from there each answer's first token is foreseen.
    """
    bundles = _bundles(experiences, seq_len) if fork else [_Bundle([i]) for i in range(len(experiences))]
    lengths = np.array([bundle.length(experiences) for bundle in bundles], np.int64)
    packing = pack(lengths, seq_len)
    rows = [packing.order[a:b].tolist() for a, b in zip(packing.offsets, packing.offsets[1:], strict=False)] or [[]]
    shape = len(rows), seq_len
    ids_BT, labels_BT = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    docs_BT = torch.full(shape, -1, dtype=torch.int32)
    positions_BT = torch.zeros(shape, dtype=torch.int64)
    names = [name for name in COLUMNS[1:] if any(name in one.columns for one in experiences)]
    columns = {name: torch.zeros(shape) for name in names}
    places = [Spot(0, 0)] * len(experiences)
    for r, row in enumerate(rows):
        at = 0
        for document, bundle in enumerate(bundles[j] for j in row):
            trunk, begin = bundle.trunk, at + bundle.trunk
            ids_BT[r, at:begin] = torch.tensor(experiences[bundle.members[0]].ids[:trunk])
            docs_BT[r, at:begin] = document
            positions_BT[r, at:begin] = torch.arange(trunk)
            for branch, i in enumerate(bundle.members, 1 if trunk else 0):
                one, end = experiences[i], begin + len(experiences[i].ids) - trunk
                answer = slice(begin + one.start - trunk - 1, end - 1)  # the place before each token of the answer
                ids_BT[r, begin:end] = torch.tensor(one.ids[trunk:])
                own = one.columns["mask"] > 0
                labels_BT[r, answer] = torch.where(own, torch.tensor(one.ids[one.start :]), IGNORE)
                docs_BT[r, begin:end] = document + BRANCH * branch
                positions_BT[r, begin:end] = torch.arange(trunk, len(one.ids))
                for name, column in columns.items():
                    column[r, answer] = one.columns[name]
                places[i], begin = Spot(r, answer.start), end
            at = begin
        positions_BT[r, at:] = torch.arange(shape[1] - at)  # the filler counts as a document of its own
    extra: dict[str, Any] = {f"{name}_BT": column for name, column in columns.items()}
    return RolloutBatch(ids_BT, labels_BT, positions_BT, docs_BT, **extra), places


def _bundles(experiences: Sequence[Experience], seq_len: int) -> list[_Bundle]:
    """Answers to one prompt together, as many as a row takes."""
    asked: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(experiences):
        asked.setdefault(tuple(one.ids[: one.start]), []).append(i)
    out = []
    for prompt, members in asked.items():
        trunk = len(prompt) - 1
        if not trunk:  # the one token stands in every branch
            out += [_Bundle([i]) for i in members]
            continue
        packing = pack(np.array([len(experiences[i].ids) - trunk for i in members], np.int64), seq_len - trunk)
        for begin, end in zip(packing.offsets, packing.offsets[1:], strict=False):
            part = [members[j] for j in packing.order[begin:end].tolist()]
            out.append(_Bundle(part, trunk if len(part) > 1 else 0))
    return out


def split_rows(batch: RolloutBatch, rows: int, device: torch.device) -> Iterator[RolloutBatch]:
    """The batch, so many rows at a time, each time as wide as these are: answers seldom fill a row, filler costs."""
    whole = WHOLE.get(device.type, WHOLE["cuda"])
    for begin in range(0, len(batch.input_ids_BT), rows):
        docs_BT = batch.doc_ids_BT[begin : begin + rows]
        longest = max(1, int((docs_BT >= 0).sum(1).max()))  # filler stands behind all else
        part = slice(begin, begin + rows), slice(-(-longest // whole) * whole)
        yield batch.each(lambda tensor, part=part: tensor[part].contiguous())  # type: ignore[misc]


def unpack_column(rows: Sequence[Tensor], experiences: Sequence[Experience], places: Sequence[Spot], name: str) -> None:
    """Give every answer its figures back from rows of them."""
    for one, place in zip(experiences, places, strict=True):
        one.columns[name] = rows[place.row][place.begin : place.begin + one.length].float().cpu().clone()


def stacked(experiences: Sequence[Experience], name: str) -> Tensor:
    """A column of all answers, [N, L], 0 behind the end of each."""
    longest = max((one.length for one in experiences), default=1)
    out_NL = torch.zeros(len(experiences), longest)
    for row, one in zip(out_NL, experiences, strict=True):
        row[: one.length] = one.columns[name]
    return out_NL


def unstack(values_NL: Tensor, experiences: Sequence[Experience], name: str) -> None:
    for row, one in zip(values_NL, experiences, strict=True):
        one.columns[name] = row[: one.length].clone()


def to_tensors(experiences: Sequence[Experience]) -> dict[str, Tensor]:
    """What a checkpoint keeps of them."""
    names = [name for name in COLUMNS if experiences and name in experiences[0].columns]
    out = {
        "numbers": torch.tensor([one.number for one in experiences], dtype=torch.int64),
        "starts": torch.tensor([one.start for one in experiences], dtype=torch.int64),
        "lengths": torch.tensor([len(one.ids) for one in experiences], dtype=torch.int64),
        "truncated": torch.tensor([one.truncated for one in experiences], dtype=torch.uint8),
        "rewards": torch.tensor([one.reward for one in experiences], dtype=torch.float64),
        "ids": torch.tensor([token for one in experiences for token in one.ids], dtype=torch.int64),
    }
    return out | {f"column {name}": torch.cat([one.columns[name] for one in experiences]) for name in names}


def from_tensors(tensors: dict[str, Tensor]) -> list[Experience]:
    starts, lengths = tensors["starts"].tolist(), tensors["lengths"].tolist()
    answers = [length - start for start, length in zip(starts, lengths, strict=True)]
    columns = {
        name.removeprefix("column "): column.split(answers)
        for name, column in tensors.items()
        if name.startswith("column ")
    }
    kept = zip(
        tensors["numbers"].tolist(), tensors["ids"].split(lengths), starts, tensors["truncated"].tolist(),
        tensors["rewards"].tolist(), strict=True,
    )  # fmt: skip
    return [
        Experience(number, ids.tolist(), start, bool(truncated), reward, {k: c[i].clone() for k, c in columns.items()})
        for i, (number, ids, start, truncated, reward) in enumerate(kept)
    ]
