"""What does the model see at step s? Rows of packed documents, as a pure function of (seed, step, rank).

Nothing here keeps a position that a checkpoint would have to save: `Loader.batch_at(step)` computes which rows belong
to the step, so resuming at step 1,000,000 costs the same as starting at 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.data.mix import Index, Source, choose, permutation
from groundup.data.pack import cut, pack
from groundup.data.read import OnBad
from groundup.data.shards import Progress, TokenShards, tokenize_files
from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

IGNORE = -100


@dataclass
class Batch:
    """B rows of T tokens. Documents in a row must not see each other: attend where doc_ids_BT are equal, causally.

    input_ids_BT: int64, pad_id in the filler. labels_BT: int64, the next token of the same document, or -100 where
    there is none or it is not trained. position_ids_BT: int64, restarting at 0 with each document (and in the filler).
    doc_ids_BT: int32, the document's number in its row, -1 in the filler at the row's end. Of judged answers twice that
    number, and one more where the answer is not wanted.
    Of kinds "stepwise" and "outcome" labels_BT is 1 where something right ends, 0 where something wrong does.
    weights_BT: float32 weight of each target in the loss, or None where all weigh the same.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    doc_ids_BT: torch.Tensor
    weights_BT: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(
            moved(self.input_ids_BT),
            moved(self.labels_BT),
            moved(self.position_ids_BT),
            moved(self.doc_ids_BT),
            None if self.weights_BT is None else moved(self.weights_BT),
        )


class PackedDataset:
    """Documents packed into rows of seq_len tokens. Holds a few bytes a document; the tokens stay on disk.

    parts: shards and which of their documents an epoch holds (a document may be listed twice); of pairs, which pairs.
    A pair is never parted: its two documents follow each other in a row, the chosen one has an even doc_id. So has a
    wanted answer among single ones (kind "unpaired").
    token_weights: loss weight of targets by token id (reasoning distillation weighs its marks 10); others weigh 1.
    documents, trained_tokens (targets), bytes (UTF-8, of the trained text) are counted over one epoch.
    """

    def __init__(
        self,
        parts: Sequence[tuple[TokenShards, Index]],
        seq_len: int,
        pad_id: int,
        seed: int = 0,
        token_weights: dict[int, float] | None = None,
    ) -> None:
        if seq_len < 2:
            raise UserError("seq_len", f"{seq_len} leaves nothing to predict", "use at least 2, usually 256 or more")
        if not any(len(chosen) for _, chosen in parts):
            raise UserError(
                "data", "holds no document to train on", "check the files with `groundup data inspect FILE`"
            )
        self.seq_len, self.pad_id, self.token_weights = seq_len, pad_id, token_weights or {}
        self.shards = [shards for shards, _ in parts]
        self.documents = sum(len(chosen) for _, chosen in parts)
        self.together, self.judged = parts[0][0].together, parts[0][0].judged
        parts = [(shards, _runs(chosen, self.together)) for shards, chosen in parts]
        self.bytes = sum(int(shards.bytes[chosen].sum(dtype=np.int64)) for shards, chosen in parts)
        self.trained_tokens = sum(int(shards.trained[chosen].sum(dtype=np.int64)) for shards, chosen in parts)
        self._place(parts, seed)

    def _place(self, parts: Sequence[tuple[TokenShards, Index]], seed: int) -> None:
        """Cut and pack; keep, in the order of the rows, each piece's shard, first token, length, whether it goes on."""
        pieces: list[list[NDArray[Any]]] = []
        for number, (shards, chosen) in enumerate(parts):
            begin = shards.offsets[chosen]
            cuts = cut(shards.offsets[chosen + 1] - begin, self.seq_len)
            if shards.mask is not None and cuts.continues.any():
                raise ValueError(f"a conversation is longer than seq_len {self.seq_len}: tokenise with max_len=seq_len")
            shard = np.full(len(cuts.document), number, np.int16)
            columns: list[NDArray[Any]] = [shard, begin[cuts.document] + cuts.start, cuts.length, cuts.continues]
            pieces.append(columns + ([] if shards.wanted is None else [shards.wanted[chosen][cuts.document]]))
        columns = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        del pieces, begin, cuts, shard  # each is 40 MB with five million documents
        packing = pack(columns[2].reshape(-1, self.together).sum(1), self.seq_len, seed)
        order = _runs(packing.order, self.together)
        self._shard, self._start, self._length, self._continues, *judged = (column[order] for column in columns)
        self.wanted: NDArray[np.uint8] | None = judged[0] if judged else None  # of each document, in the rows' order
        self._offsets, self.fill = packing.offsets * self.together, packing.fill

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._offsets) - 1

    def row(self, i: int) -> Batch:
        """Row i as a batch of one."""
        return self.batch(np.array([range(len(self))[i]]))

    def batch(self, rows: NDArray[np.integer]) -> Batch:
        """These rows as one batch, gathered without a loop over tokens or documents."""
        counts = self._offsets[rows + 1] - self._offsets[rows]
        pieces = _ranges(self._offsets[rows], counts)
        length = self._length[pieces].astype(np.int64)
        piece_row = np.repeat(np.arange(len(rows)), counts)
        before = np.cumsum(length) - length  # tokens before the piece in the whole batch, then in its row
        column = before - np.repeat(before[np.cumsum(counts) - counts], counts)
        within = _ranges(np.zeros_like(length), length)
        place = np.repeat(piece_row * self.seq_len + column, length) + within
        has_next = (within < np.repeat(length - 1, length)) | np.repeat(self._continues[pieces], length)
        ids, labels = self._tokens(
            np.repeat(self._shard[pieces], length), np.repeat(self._start[pieces], length) + within
        )

        shape = (len(rows), self.seq_len)
        input_ids, targets = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        doc_ids = np.full(shape, -1, np.int32)
        # The filler counts from 0 as a document of its own: no position is out of range, and kernels that find
        # documents by position 0 see one more of them, not one a token.
        filled = np.bincount(piece_row, weights=length, minlength=len(rows)).astype(np.int64)
        positions = np.maximum(np.arange(self.seq_len) - filled[:, None], 0)
        input_ids.reshape(-1)[place] = ids
        targets.reshape(-1)[place] = labels if self.judged else np.where(has_next, labels, IGNORE)
        positions.reshape(-1)[place] = within
        numbers = _ranges(np.zeros_like(counts), counts)
        if self.wanted is not None:
            numbers = 2 * numbers + 1 - self.wanted[pieces]
        doc_ids.reshape(-1)[place] = np.repeat(numbers, length)
        weights = self._weights(targets) if self.token_weights else None
        ids_BT, labels_BT, positions_BT, docs_BT = map(torch.from_numpy, (input_ids, targets, positions, doc_ids))
        return Batch(ids_BT, labels_BT, positions_BT, docs_BT, weights)

    def documents_of(self, rows: NDArray[np.integer]) -> tuple[Index, NDArray[np.int16], Index]:
        """(its row, its shard, its number in the shard) of each document in these rows, in their order.

        For the kinds whose documents are never cut.
        """
        counts = self._offsets[rows + 1] - self._offsets[rows]
        pieces = _ranges(self._offsets[rows], counts)
        shard, start = self._shard[pieces], self._start[pieces]
        number = np.empty(len(pieces), np.int64)
        for one in np.unique(shard):
            number[shard == one] = np.searchsorted(self.shards[one].offsets, start[shard == one])
        return np.repeat(rows, counts), shard, number

    def _tokens(self, shard: NDArray[np.int16], at: Index) -> tuple[Index, Index]:
        """Tokens at these places and the trained ones right after them (-100: not trained)."""
        ids, labels = np.empty(len(at), np.int64), np.empty(len(at), np.int64)
        for number in np.unique(shard):
            shards, here = self.shards[number], shard == number
            now = at[here]
            after = np.minimum(
                now + 1, len(shards.tokens) - 1
            )  # the last token of all has no next; the caller masks it
            ids[here], labels[here] = shards.tokens[now], shards.tokens[after]
            if shards.mask is not None and shards.judged:
                labels[here] = np.array([IGNORE, 0, 1])[shards.mask[now]]
            elif shards.mask is not None:
                labels[here] = np.where(shards.mask[after] == 1, labels[here], IGNORE)
        return ids, labels

    def _weights(self, targets: Index) -> torch.Tensor:
        weights = np.ones(targets.shape, np.float32)
        for token, weight in self.token_weights.items():
            weights[targets == token] = weight
        return torch.from_numpy(weights)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Every row once, in order, for evaluation: the ranks share the rows; the last batch may be smaller."""
        rows = np.arange(rank, len(self), world_size)
        for begin in range(0, len(rows), batch_size):
            yield self.batch(rows[begin : begin + batch_size])


def _ranges(starts: NDArray[np.integer], counts: NDArray[np.integer]) -> Index:
    """[s, s + 1, ... s + c - 1] of each start and count, joined."""
    return np.arange(int(counts.sum())) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def _runs(numbers: Index, length: int) -> Index:
    """The documents of these units of `length` documents each."""
    return numbers if length == 1 else _ranges(numbers * length, np.full_like(numbers, length))


class Loader:
    """Endless shuffled batches of a dataset, by step number.

    Rows stream over the epochs without a gap: a batch may hold the end of one epoch and the start of the next, so each
    epoch sees every row once whatever the batch size. Of the W x b rows of step s, rank r gets rows [r b, (r + 1) b):
    W ranks with b rows see what one process with W b rows sees.
    """

    def __init__(self, dataset: PackedDataset, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise UserError(
                "batch_size", f"{batch_size} rows on rank {rank} of {world_size} make no batch", "use 1 or more"
            )
        self.dataset, self.batch_size, self.seed, self.rank, self.world_size = (
            dataset,
            batch_size,
            seed,
            rank,
            world_size,
        )
        self._epochs: dict[int, Index] = {}

    @property
    def rows_per_epoch(self) -> int:
        return len(self.dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was seen once (the last one may reach into the next epoch)."""
        return -(-self.rows_per_epoch // (self.batch_size * self.world_size))

    def batch_at(self, step: int) -> Batch:
        """This rank's rows of a step, counted from 0."""
        return self.dataset.batch(self.rows_at(step))

    def rows_at(self, step: int) -> Index:
        """Their numbers in the dataset."""
        first = (step * self.world_size + self.rank) * self.batch_size
        stream = np.arange(first, first + self.batch_size)
        epochs, places = np.divmod(stream, self.rows_per_epoch)
        return np.concatenate([self._epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def _epoch(self, epoch: int) -> Index:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # this one and the one before: a batch may straddle them
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = permutation(self.rows_per_epoch, self.seed, epoch)
        return self._epochs[epoch]

    def state(self) -> dict[str, int]:
        """What must not change for a resumed run to see the same rows. The position is the step: the loop keeps it."""
        return {
            "rows": self.rows_per_epoch,
            "seq_len": self.dataset.seq_len,
            "global_batch": self.batch_size * self.world_size,
            "seed": self.seed,
        }


def open_dataset(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    kind: str,
    seq_len: int,
    cache_dir: str | Path,
    seed: int,
    val_fraction: float = 0.0,
    workers: int | None = None,
    on_bad: OnBad = "raise",
    token_weights: dict[int, float] | None = None,
    placeholders: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> tuple[PackedDataset, PackedDataset | None]:
    """Files to packed rows: tokenised once (cached), mixed by weight, split, packed.

    kind: "text" trains every token, documents longer than a row go on in another; "chat" trains what the assistant
    says, conversations longer than a row are cut to it; "preference": the answers of pairs, cut to a row together;
    "unpaired": single answers that are wanted or not; "stepwise", "outcome": steps, or answers, right or wrong.
    Returns (train, validation); validation is None where val_fraction is 0 or there is only one document. on_bad,
    placeholders, progress: as tokenize_files has them, a source at a time. Errors: UserError.
    """
    if seq_len < 2:
        raise UserError("seq_len", f"{seq_len} leaves nothing to predict", "use at least 2, usually 256 or more")
    if not sources:
        raise UserError("data", "no source is given", "name at least one file")
    train, val = [], []
    for source in sources:
        max_len = None if kind == "text" else seq_len
        options: dict[str, Any] = {"on_bad": on_bad, "placeholders": placeholders, "progress": progress}
        shards = tokenize_files([source.path], tokenizer, kind, cache_dir, workers, max_len, **options)
        for_training, held_out = choose(len(shards) // shards.together, source, seed, val_fraction)
        train.append((shards, for_training))
        val.append((shards, held_out))
    pack_rows = partial(PackedDataset, seq_len=seq_len, pad_id=tokenizer.pad_id, seed=seed, token_weights=token_weights)
    return pack_rows(train), pack_rows(val) if any(len(held_out) for _, held_out in val) else None
