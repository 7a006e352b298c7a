"""What every kind of question can do: ask on either side of the split, and tell the same matter as pretraining text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")
Templates = Mapping[str, Sequence[str]]  # by language


class Asked(NamedTuple):
    """A question with its one right answer."""

    question: str
    answer: str


class Kind(Protocol):
    """A kind of question. `name` is what reports call it."""

    name: str

    def ask(self, rng: Random, language: str, held_out: bool) -> Asked:
        """A question whose combination lies on the given side of the split."""

    def tell(self, rng: Random, language: str) -> str:
        """A short pretraining text about the same matter."""


def draw(make: Callable[[], T], wanted: Callable[[T], bool]) -> T:
    """Draw until the combination is wanted; sides are never so rare that this takes long."""
    while True:
        item = make()
        if wanted(item):
            return item


def fill(rng: Random, templates: Templates, language: str, **words: object) -> str:
    """One of the language's templates, filled."""
    return rng.choice(templates[language]).format(**words)
