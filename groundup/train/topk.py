"""What did the teacher say? Its k likeliest next tokens for every trained token, computed once, kept on disk, mapped.

A folder holds, row after row of the packed data, `ids.bin` and `logprobs.bin` ([tokens, k]: 2 or 4 bytes and an fp16
a number), `offsets.bin` (the first trained token of each row, and the end), and `meta.json`, written last. It is found
again by what it was made from: the teacher's weights, k, the temperature, and whatever decides the rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.config import Recipe
from groundup.data.batch import IGNORE, Batch, PackedDataset
from groundup.dist import World
from groundup.errors import UserError
from groundup.files import write_json
from groundup.ops.distill import Likeliest
from groundup.train.checkpoint import check_space

VERSION = 1  # of what the folder holds; part of its name
AT_ONCE = 64  # batches between two syncs with the disk
COUNTED = 256  # rows of which the trained tokens are counted at a time

log = logging.getLogger(__name__)
Ask = Callable[[Batch], Likeliest]


class TopK:
    """The teacher's answers to a data set, of a whole folder."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.offsets = np.memmap(folder / "offsets.bin", np.int64, "r")
        shape = int(self.offsets[-1]), meta["k"]
        self.ids_NK = np.memmap(folder / "ids.bin", meta["ids"], "r", shape=shape)
        self.logprobs_NK = np.memmap(folder / "logprobs.bin", np.float16, "r", shape=shape)

    def look_up(self, rows: NDArray[np.integer]) -> Likeliest:
        """Of the trained tokens of these rows, in their order."""
        places = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        ids_MK, logprobs_MK = self.ids_NK[places].astype(np.int32), self.logprobs_NK[places]
        return Likeliest(torch.from_numpy(ids_MK), torch.from_numpy(logprobs_MK))


def name_of(recipe: Recipe, data: PackedDataset, teacher: str, part: str, width: int) -> str:
    """The folder's name. teacher: a hash of its weights. part: "train" or "val". width: ids that are looked at."""
    settings = recipe.distill
    parts: list[Any] = [VERSION, teacher, recipe.train.dtype, settings.top_k, settings.temperature, width, part]
    parts += [[(s.weight, s.split) for s in recipe.data], recipe.eval.fraction, recipe.seed, data.seq_len, len(data)]
    parts += [shards.path.name for shards in data.shards]  # themselves named by all that their tokens depend on
    return f"topk-{hashlib.blake2b(repr(parts).encode(), digest_size=10).hexdigest()}"


def open_topk(
    folder: Path, data: PackedDataset, k: int, width: int, teacher: Callable[[], Ask], size: int, world: World
) -> TopK:
    """The folder, first made if it is not there: all ranks share the work, and a run that was killed goes on.

    teacher: loads it, only if something is to be asked. size: rows at a time. UserError: k beyond the vocabulary, or no
    room on the disk.
    """
    if k > width:
        raise UserError("distill.top_k", f"{k} is more than the vocabulary of {width}", "use 32 or so")
    there = world.gather_objects((folder / "meta.json").is_file())[0]
    if not there:
        with _building(folder, world):
            if not world.gather_objects((folder / "meta.json").is_file())[0]:  # another run may have built it meanwhile
                _build(folder, data, k, width, teacher(), size, world)
    return TopK(folder)


def _build(folder: Path, data: PackedDataset, k: int, width: int, ask: Ask, size: int, world: World) -> None:
    part, kind = folder.with_name(f".{folder.name}.part"), np.uint16 if width <= 2**16 else np.uint32
    if world.main and not (part / "done.bin").is_file():
        _lay_out(part, data, k, kind)
    world.barrier()
    offsets, done = np.memmap(part / "offsets.bin", np.int64, "r"), np.memmap(part / "done.bin", np.uint8, "r+")
    shape = int(offsets[-1]), k
    ids_NK = np.memmap(part / "ids.bin", kind, "r+", shape=shape)
    logprobs_NK = np.memmap(part / "logprobs.bin", np.float16, "r+", shape=shape)
    rows = np.flatnonzero(done[: len(data)] == 0)[world.rank :: world.size]
    if world.main:
        log.warning("asking the teacher about %s trained tokens, once", f"{shape[0]:,}")
    told = time.monotonic()
    world.barrier()  # all have read what is left to do
    for begin in range(0, len(rows), size * AT_ONCE):
        some = rows[begin : begin + size * AT_ONCE]
        for at in range(0, len(some), size):
            batch_rows = some[at : at + size]
            says = ask(data.batch(batch_rows))
            places = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in batch_rows])
            ids_NK[places] = says.ids_MK.cpu().numpy().astype(kind)
            logprobs_NK[places] = says.logprobs_MK.half().cpu().numpy()
        ids_NK.flush()
        logprobs_NK.flush()
        done[some] = 1  # only now: a row that is marked is on the disk
        done.flush()
        if world.main and time.monotonic() - told > 60:
            told = time.monotonic()
            log.warning("asking the teacher: %d %% done", 100 * min(1.0, (begin + len(some)) / len(rows)))
    world.barrier()
    if world.main:
        write_json(part / "meta.json", {"k": k, "ids": np.dtype(kind).name, "rows": len(data)})
        part.replace(folder)
    world.barrier()


def _lay_out(part: Path, data: PackedDataset, k: int, kind: type[np.generic]) -> None:
    """Empty files of their final sizes; done.bin, the mark that they are laid out, is the last."""
    part.mkdir(parents=True, exist_ok=True)
    counts = [
        (data.batch(np.arange(at, min(at + COUNTED, len(data)))).labels_BT != IGNORE).sum(1)
        for at in range(0, len(data), COUNTED)
    ]
    offsets = np.concatenate([np.zeros(1, np.int64), torch.cat(counts).numpy().cumsum()])
    total = int(offsets[-1]) * k
    check_space(part, total * (np.dtype(kind).itemsize + 2))
    (part / "offsets.bin").write_bytes(offsets.tobytes())
    sizes = {"ids": total * np.dtype(kind).itemsize, "logprobs": total * 2}
    for name, number in sizes.items():
        with (part / f"{name}.bin").open("wb") as file:
            file.truncate(number)
    temporary = part / "done.new"
    temporary.write_bytes(bytes(len(data)))
    temporary.replace(part / "done.bin")


@contextmanager
def _building(folder: Path, world: World) -> Iterator[None]:
    """One run builds a folder at a time; another waits for it. The system frees the lock of a process that died."""
    from filelock import FileLock

    if not world.main:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        yield
