"""Which neighbours are worth gluing? BPE learned on any sequence of ids, in time that follows what is glued.

The text is one linked list in arrays, with an EDGE between words. A pair's places are known; gluing it touches those
places alone and finds the new pairs beside them. Counts of old pairs only fall, so they are counted again when a pair's
turn comes, not before: the pair with the largest fresh count is the most frequent one.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

EDGE = -1  # between words, and where a symbol must not be glued
RARE = 2  # a pair that is seen less often is not worth a piece
Ids = NDArray[np.int32]
Pair = tuple[int, int]


def learn_merges(
    ids: Ids, names: dict[int, str], add: int, first: int, allowed: Callable[[str], bool]
) -> list[tuple[int, int, int]]:
    """The merges (left, right, result) of at most `add` new pieces, in the order in which they apply.

    ids: the text, words parted by EDGE. names: id -> spelling; gains the new pieces, numbered from `first`.
    allowed: whether a spelling may be a piece. A pair that spells an old piece is a merge, too, but not a new piece.
    """
    text = _Text(ids)
    known = {name: number for number, name in names.items()}
    merges: list[tuple[int, int, int]] = []
    done: set[Pair] = set()
    end = first + add
    while first < end and (popped := text.pop()):
        claimed, pair = popped
        piece = names[pair[0]] + names[pair[1]]
        if not allowed(piece):
            continue
        places = text.places(pair)
        if len(places) < claimed and len(places) < text.largest():
            text.put_back(pair, len(places))
            continue
        if len(places) < RARE:
            continue
        number = known.get(piece, first)
        if number == first:
            names[number], known[piece] = piece, number
            first += 1
        if pair not in done:
            done.add(pair)
            merges.append((*pair, number))
        del text.found[pair]
        text.glue(places, number)
    return merges


class _Text:
    """Symbols in a linked list, and where each pair of neighbours is."""

    def __init__(self, ids: Ids) -> None:
        self.symbols = np.append(ids, np.int32(EDGE)).astype(np.int32)  # the last place is no neighbour of anybody
        size = len(ids)
        self.after = np.arange(1, size + 2, dtype=np.int32)
        self.before = np.arange(-1, size, dtype=np.int32)
        self.after[size], self.before[0] = size, size
        self.heap: list[tuple[int, int, int]] = []
        self.found: defaultdict[Pair, list[Ids]] = defaultdict(list)
        self._index()

    def _index(self) -> None:
        """Sort the places by their pair, once; `queue` lists the pairs, the most frequent last."""
        left, right = self.symbols[:-1], self.symbols[1:]
        places = np.flatnonzero((left != EDGE) & (right != EDGE)).astype(np.int32)
        keys = (left[places].astype(np.int64) << 32) | right[places]
        order = np.argsort(keys, kind="stable")
        self.sorted, keys = places[order], keys[order]
        begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, np.int64)
        counts = np.diff(np.append(begins, len(keys)))
        often = counts >= RARE
        self.keys, self.begins, self.counts = keys[begins][often], begins[often], counts[often]
        self.queue = np.lexsort((-self.keys, self.counts)).tolist()

    def largest(self) -> int:
        """The largest count that any pair still claims."""
        first = int(self.counts[self.queue[-1]]) if self.queue else 0
        return max(first, -self.heap[0][0] if self.heap else 0)

    def pop(self) -> tuple[int, Pair] | None:
        """The pair that claims to be the most frequent, with its claim: it may have become rarer."""
        if not self.queue and not self.heap:
            return None
        if self.heap and (not self.queue or -self.heap[0][0] >= self.counts[self.queue[-1]]):
            count, left, right = heapq.heappop(self.heap)
            return -count, (left, right)
        index = self.queue.pop()
        begin, count, key = int(self.begins[index]), int(self.counts[index]), int(self.keys[index])
        pair = (key >> 32, key & 0xFFFFFFFF)
        self.found[pair].append(self.sorted[begin : begin + count])
        return count, pair

    def put_back(self, pair: Pair, count: int) -> None:
        if count >= RARE:
            heapq.heappush(self.heap, (-count, *pair))

    def places(self, pair: Pair) -> Ids:
        """Where the pair stands now, from left to right and without overlap (as in a a a)."""
        left, right = pair
        lists = self.found[pair]
        places = lists[0] if len(lists) == 1 else np.unique(np.concatenate([np.zeros(0, np.int32), *lists]))
        places = places[self.symbols[places] == left]
        places = places[self.symbols[self.after[places]] == right]
        self.found[pair] = [places]
        if left != right or len(places) < 2:
            return places
        kept, taken = [], -1
        for place in np.sort(places).tolist():
            if place != taken:
                kept.append(place)
                taken = int(self.after[place])
        return np.array(kept, np.int32)

    def glue(self, places: Ids, number: int) -> None:
        """Make the pair at `places` one symbol, and note the pairs that it now forms with its neighbours."""
        second = self.after[places]
        beyond = self.after[second]
        self.symbols[places], self.symbols[second] = number, EDGE
        self.after[places], self.before[beyond] = beyond, places
        ahead, behind = self.before[places], self.after[places]
        left, right = self.symbols[ahead], self.symbols[behind]
        inner = (left != EDGE) & (left != number)  # two new ones in a row are noted once, from the left one
        self._note(left[inner], ahead[inner], number, True)
        self._note(right[right != EDGE], places[right != EDGE], number, False)

    def _note(self, neighbours: Ids, places: Ids, number: int, are_left: bool) -> None:
        if not len(neighbours):
            return
        order = np.argsort(neighbours, kind="stable")
        neighbours, places = neighbours[order], places[order]
        begins = np.flatnonzero(np.append(True, neighbours[1:] != neighbours[:-1]))
        counts = np.diff(np.append(begins, len(neighbours)))
        for index in np.flatnonzero(counts >= RARE).tolist():
            begin, count = int(begins[index]), int(counts[index])
            other = int(neighbours[begin])
            pair = (other, number) if are_left else (number, other)
            self.found[pair].append(places[begin : begin + count])
            heapq.heappush(self.heap, (-count, *pair))
