"""What every kind of question can do: draw a matter on either side of the split, ask about it, and tell it as text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple, TypeVar

from groundup.world.words import LANGUAGES

T = TypeVar("T")
Templates = Mapping[str, Sequence[str]]  # by language


class Asked(NamedTuple):
    """A question, its one right answer in as few words as possible, and the sentence that says the same."""

    question: str
    answer: str
    sentence: str


class Matter(NamedTuple):
    """What is told before the questions (may be empty), and all that can be asked about it."""

    context: str
    asked: list[Asked]


class Kind(ABC):
    """A kind of question. `name` is what reports call it."""

    name: str

    @abstractmethod
    def draw(self, rng: Random, held_out: bool) -> Any:
        """Something to ask about, free of language; every question about it lies on the given side of the split."""

    @abstractmethod
    def say(self, rng: Random, language: str, item: Any) -> Matter:
        """The same in words."""

    def ask(self, rng: Random, language: str, held_out: bool) -> Matter:
        """A drawn matter in words, its questions in a random order."""
        matter = self.say(rng, language, self.draw(rng, held_out))
        return Matter(matter.context, rng.sample(matter.asked, len(matter.asked)))

    def tell(self, rng: Random, language: str) -> str:
        """Pretraining text: the context, then what follows from it; sometimes all of it again in the other language."""
        item = self.draw(rng, held_out=False)
        languages = [language]
        if rng.random() < 0.3:
            languages.append(next(other for other in LANGUAGES if other != language))
        return "\n".join(self._tell_in(rng, each, item) for each in languages)

    def _tell_in(self, rng: Random, language: str, item: Any) -> str:
        context, asked = self.say(rng, language, item)
        return "\n".join([context, answered(rng, language, rng.sample(asked, len(asked)))]).strip()


def answered(rng: Random, language: str, asked: Sequence[Asked]) -> str:
    """The answers as statements, or as a talk of questions and answers, in sentences or in a word."""
    between = " " if language == "en" else ""
    way = rng.random()
    if way < 0.3:
        return "\n".join(f"{a.question}\n{a.answer}" for a in asked)
    return between.join(f"{a.question}{between}{a.sentence}" if way < 0.6 else a.sentence for a in asked)


def draw_until(make: Callable[[], T], wanted: Callable[[T], bool]) -> T:
    """Draw until the combination is wanted; sides are never so rare that this takes long."""
    while True:
        item = make()
        if wanted(item):
            return item


def fill(rng: Random, templates: Templates, language: str, **words: object) -> str:
    """One of the language's templates, filled."""
    return rng.choice(templates[language]).format(**words)
