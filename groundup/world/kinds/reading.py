"""Reading: sentences about freshly combined people, things, colours and rooms, and questions about them."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, draw_until, fill
from groundup.world.people import Person
from groundup.world.split import held_out as is_held_out
from groundup.world.words import COLOURS, ROOMS, THINGS, Word, a

OWNS: Templates = {
    "en": ["{p} has {a_c} {t}.", "{p} carries {a_c} {t}.", "{p} got {a_c} {t}."],
    "zh": ["{p}有一{m}{c}的{t}。", "{p}拿着一{m}{c}的{t}。", "{p}得到了一{m}{c}的{t}。"],
}
IS_IN: Templates = {
    "en": ["{p} is in the {l}.", "{p} went to the {l}.", "{p} sits in the {l}."],
    "zh": ["{p}在{l}。", "{p}去了{l}。", "{p}坐在{l}里。"],
}
QUESTIONS: dict[str, Templates] = {
    "colour": {
        "en": ["What colour is {p}'s {t}?", "Which colour is the {t} of {p}?"],
        "zh": ["{p}的{t}是什么颜色？", "{p}的{t}是哪种颜色？"],
    },
    "owner": {"en": ["Who has the {t}?", "Whose is the {t}?"], "zh": ["谁有{t}？", "{t}是谁的？"]},
    "thing": {"en": ["What does {p} have?", "What thing is {p}'s?"], "zh": ["{p}有什么？", "{p}的东西是什么？"]},
    "room": {"en": ["Where is {p}?", "In which room is {p}?"], "zh": ["{p}在哪里？", "{p}在哪个地方？"]},
    "visitor": {"en": ["Who is in the {l}?"], "zh": ["谁在{l}？"]},
}


class Scene(NamedTuple):
    """One person with a thing of some colour, in some room."""

    person: Person
    thing: Word
    colour: Word
    room: Word

    def words(self, language: str) -> dict[str, str]:
        colour = self.colour.text(language)
        return {
            "p": self.person.name.text(language),
            "t": self.thing.text(language),
            "m": self.thing.measure,
            "c": colour,
            "a_c": a(colour),
            "l": self.room.text(language),
        }


class Reading(Kind):
    """Who, where, what and which colour; answered by the sentence of the story that tells it.

    Held out are pairs of people who share a story: any person may hold any thing on either side.
    """

    name = "reading"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def is_held_out(self, scenes: list[Scene]) -> bool:
        return is_held_out(self.seed, self.name, *sorted(scene.person.name.en for scene in scenes))

    def draw(self, rng: Random, held_out: bool) -> list[Scene]:
        """Two scenes that share nothing."""

        def make() -> list[Scene]:
            parts = zip(*(rng.sample(list(pool), 2) for pool in (self.people, THINGS, COLOURS, ROOMS)), strict=True)
            return [Scene(*part) for part in parts]

        return draw_until(make, lambda scenes: self.is_held_out(scenes) == held_out)

    def say(self, rng: Random, language: str, item: list[Scene]) -> Matter:
        told, kinds = rng.choice([(OWNS, ("colour", "owner", "thing")), (IS_IN, ("room", "visitor"))])
        wording = rng.choice(told[language])  # one in the whole story
        asked = []
        for scene in item:
            words = scene.words(language)
            sentence = wording.format(**words)
            asked.append(Asked(fill(rng, QUESTIONS[rng.choice(kinds)], language, **words), sentence, sentence))
        return Matter((" " if language == "en" else "").join(one.sentence for one in asked), asked)
