"""Which documents does an epoch hold? Sources with weights, disjoint shares, and a held-out part.

Every choice is a pure function of (document number, seed) through one hash, so it is the same on every machine, rank
and numpy version, and a document that is appended to a file moves no other document from training to validation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundup.errors import UserError

Index = NDArray[np.int64]
SPLIT, HOLD_OUT, WEIGHT = 1, 2, 3  # so that one seed makes unrelated choices


@dataclass(frozen=True)
class Source:
    """One file (or folder, or `DIR:NAME` of a dataset_info.json) of a mixture.

    weight: how many times each of its documents appears in an epoch; 0.5 is half of them, 2 is each twice.
    split: DeepSpeed-Chat's `data_split` and the share to take: `"2,4,4:0"` is the first of three disjoint shares.
    """

    path: str
    weight: float = 1.0
    split: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(self.path, f"weight {self.weight} is not a positive number", "leave the source out instead")
        if self.split is not None:
            parse_split(self.split)


def parse_split(split: str) -> tuple[list[float], int]:
    """`"2,4,4:0"` -> ([2, 4, 4], 0). Raises UserError naming what is wrong."""
    shares_text, _, which = split.partition(":")
    fix = 'write the shares and the number of the one to take, as in "2,4,4:0"'
    try:
        shares, index = [float(share) for share in shares_text.split(",")], int(which)
    except ValueError:
        raise UserError(f"split {split!r}", "is not a list of shares and an index", fix) from None
    if not 0 <= index < len(shares):
        raise UserError(f"split {split!r}", f"has no share number {index} (they count from 0)", fix)
    if min(shares) < 0 or not math.isfinite(sum(shares)) or shares[index] == 0:
        raise UserError(f"split {split!r}", "the share to take must be positive, and no share negative", fix)
    return shares, index


def choose(documents: int, source: Source, seed: int, val_fraction: float = 0.0) -> tuple[Index, Index]:
    """(training documents with repetitions, held-out documents) of a source, each in the file's order."""
    taken = share(documents, source.split, seed)
    if not len(taken):
        raise UserError(source.path, f"{documents} documents leave none for split {source.split!r}", "bring more data")
    train, val = hold_out(taken, val_fraction, seed)
    return repeat(train, source.weight, seed), val


def share(documents: int, split: str | None, seed: int) -> Index:
    """The document numbers of one share: the source shuffled by the seed and cut at the shares' bounds."""
    if split is None:
        return np.arange(documents, dtype=np.int64)
    shares, index = parse_split(split)
    bounds = np.rint(np.cumsum([0.0, *shares]) / sum(shares) * documents).astype(np.int64)
    return np.sort(permutation(documents, seed, SPLIT)[bounds[index] : bounds[index + 1]])


def hold_out(documents: Index, fraction: float, seed: int) -> tuple[Index, Index]:
    """(train, validation): disjoint, decided by each document's own hash; of two or more, at least one on each side."""
    if not 0 <= fraction < 1:
        raise UserError("val_fraction", f"{fraction} is not in [0, 1)", "0.01 holds out one document of a hundred")
    if fraction == 0 or len(documents) < 2:
        return documents, documents[:0]
    hashes = hash64(documents, seed, HOLD_OUT)
    held = hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    held[np.argmin(hashes)] = True
    held[np.argmax(hashes)] = False
    return documents[~held], documents[held]


def repeat(documents: Index, weight: float, seed: int) -> Index:
    """Each document floor(weight) times, and a seeded choice of them once more for the fraction; at least one."""
    whole = int(weight)
    extra = round((weight - whole) * len(documents))
    if not whole and not extra:
        extra = min(1, len(documents))
    once_more = documents[permutation(len(documents), seed, WEIGHT)[:extra]]
    return np.sort(np.concatenate([np.repeat(documents, whole), once_more]))


def permutation(n: int, *key: int) -> Index:
    """A shuffle of range(n) that depends on the integers of key alone (no numpy version can change it)."""
    return np.argsort(hash64(np.arange(n), *key)).astype(np.int64, copy=False)  # a bijection has no ties to break


def hash64(numbers: NDArray[np.integer], *key: int) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea & Flood 2014) of each number under a key: distinct numbers get distinct hashes."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part % 2**64))
    return _mix(numbers.astype(np.uint64) + state)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
