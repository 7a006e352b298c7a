"""Which combinations are held out: a fixed property of the combination itself, so no generator can leak one.

Every kind of question names the combination it is about (a person and an attribute, two numbers, a person and a thing
in a story). A hash of the seed, the kind and that combination decides its side once and for all. Training text asks
questions on one side only, and the held-out questions come from the other.
"""

from __future__ import annotations

import hashlib
from random import Random


def held_out(seed: int, kind: str, *combination: object, share: float = 0.2) -> bool:
    """True for about `share` of all combinations; the same answer on every machine."""
    digest = hashlib.blake2b(repr((seed, kind, combination)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def random_for(*parts: object) -> Random:
    """A random stream of its own for each purpose, so that adding one does not move the others."""
    return Random(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big"))
