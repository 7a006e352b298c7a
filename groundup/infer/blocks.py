"""Where do keys and values lie? In blocks of a few tokens, counted by reference, found again by content.

The idea is vLLM's (PagedAttention, arXiv 2309.06180): a sequence's cache is a list of blocks, so none is reserved for
what may come, and two sequences that begin alike share the blocks of what they have in common.

A full block is known by (the name of the block before it, its tokens), compared by value: no hash can collide, so no
request ever reads another's text. Blocks that nobody uses keep their content until they are needed, the longest unused
first.

Where a soft prompt stands before every sequence, the first blocks of all are the prefix's own. Its last one may be half
full: a sequence writes on in a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count

Key = tuple[Hashable, tuple[int, ...]]


class OutOfBlocks(Exception):
    """Every block is in use."""


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens. sharing: whether full blocks are found again.

    prefix: virtual tokens that stand before every sequence; they lie in `prefix_blocks`, which are never let go.
    """

    def __init__(self, num_blocks: int, block_size: int, sharing: bool = True, prefix: int = 0) -> None:
        self.num_blocks, self.block_size, self.sharing = num_blocks, block_size, sharing
        self.prefix = prefix
        self.references = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the next to take first
        self._named: dict[Key, tuple[int, int]] = {}  # content -> (block, its name)
        self._key_of: dict[int, Key] = {}
        self._names = count()
        self.prefix_blocks = [self.take() for _ in range(self.count(0))]

    def count(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens needs, the prefix's among them."""
        return -(-(self.prefix + tokens) // self.block_size)

    def held(self, index: int) -> slice:
        """Which of a sequence's tokens its block number `index` holds when it is full."""
        start = index * self.block_size - self.prefix
        return slice(max(start, 0), max(start + self.block_size, 0))

    @property
    def capacity(self) -> int:
        """Tokens of a sequence that has all blocks to itself."""
        return (self.num_blocks - len(self.prefix_blocks)) * self.block_size - self.prefix % self.block_size

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

    def forget(self) -> None:
        """Nothing that was computed before is found again."""
        self._named.clear()
        self._key_of.clear()

    def match(self, ids: Sequence[int], root: Hashable) -> tuple[list[int], list[Hashable]]:
        """The blocks that hold the beginning of ids, the prefix's first, and names of the full ones; refers to them.
        The last token is left to be computed: its logits are wanted. root: who may share (an adapter, a tenant)."""
        whole = self.prefix // self.block_size
        blocks, names = self.prefix_blocks[:whole], [root] * whole
        name: Hashable = root
        while self.sharing and self.held(len(blocks)).stop < len(ids):
            found = self._named.get((name, tuple(ids[self.held(len(blocks))])))
            if found is None:
                break
            block, name = found
            blocks.append(block)
            names.append(name)
        if len(blocks) == whole:
            blocks += self.prefix_blocks[whole:]
        self.share(blocks)
        return blocks, names
