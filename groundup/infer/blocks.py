"""Where do keys and values lie? In blocks of a few tokens, counted by reference, found again by content.

The idea is vLLM's (PagedAttention, arXiv 2309.06180): a sequence's cache is a list of blocks, so none is reserved for
what may come, and two sequences that begin alike share the blocks of what they have in common.

A full block is known by (the name of the block before it, its tokens), compared by value: no hash can collide, so no
request ever reads another's text. Blocks that nobody uses keep their content until they are needed, the longest unused
first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count

Key = tuple[Hashable, tuple[int, ...]]


class OutOfBlocks(Exception):
    """Every block is in use."""


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens. sharing: whether full blocks are found again."""

    def __init__(self, num_blocks: int, block_size: int, sharing: bool = True) -> None:
        self.num_blocks, self.block_size, self.sharing = num_blocks, block_size, sharing
        self.references = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the next to take first
        self._named: dict[Key, tuple[int, int]] = {}  # content -> (block, its name)
        self._key_of: dict[int, Key] = {}
        self._names = count()

    @property
    def available(self) -> int:
        """Blocks that can be taken, those with remembered content among them."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.num_blocks - len(self._free)

    def take(self) -> int:
        """A block to write to. Raises OutOfBlocks."""
        if not self._free:
            raise OutOfBlocks
        block, _ = self._free.popitem(last=False)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._named[key]
        self.references[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """One more sequence refers to these."""
        for block in blocks:
            if self.references[block] == 0:
                del self._free[block]
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One sequence fewer refers to these; what lies deepest is forgotten first."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)  # nothing to remember: take it before any other

    def seal(self, block: int, before: Hashable, tokens: Sequence[int]) -> Hashable:
        """Name a full, computed block by what it holds. before: the name of the block before it (the root's, of the
        first). Returns the name: that of an equal block, where two sequences computed the same."""
        if not self.sharing:
            return None
        key = (before, tuple(tokens))
        known = self._named.get(key)
        if known is not None:
            return known[1]
        name = next(self._names)
        self._named[key], self._key_of[block] = (block, name), key
        return name

    def match(self, ids: Sequence[int], root: Hashable) -> tuple[list[int], list[Hashable]]:
        """The blocks that hold the beginning of ids, and their names; refers to them. The last token is left to be
        computed: its logits are wanted. root: who may share (an adapter, a tenant)."""
        blocks: list[int] = []
        names: list[Hashable] = []
        if not self.sharing:
            return blocks, names
        name: Hashable = root
        for start in range(0, len(ids) - self.block_size, self.block_size):
            found = self._named.get((name, tuple(ids[start : start + self.block_size])))
            if found is None:
                break
            block, name = found
            blocks.append(block)
            names.append(name)
        self.share(blocks)
        return blocks, names
