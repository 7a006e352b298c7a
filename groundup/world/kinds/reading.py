"""Reading: a few sentences about freshly combined people, things, colours and rooms, and questions about them."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, fill
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
ANSWERS: dict[str, Templates] = {
    "colour": {"en": ["{p}'s {t} is {c}."], "zh": ["{p}的{t}是{c}的。"]},
    "owner": {"en": ["The {t} is {p}'s."], "zh": ["{t}是{p}的。"]},
    "thing": {"en": ["{p}'s thing is the {t}."], "zh": ["{p}的东西是{t}。"]},
    "room": {"en": ["So {p} is in the {l}."], "zh": ["所以{p}在{l}。"]},
    "visitor": {"en": ["In the {l} is {p}."], "zh": ["在{l}的是{p}。"]},
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
    """Who, where, what and which colour; a story may hold any pair (person, thing), held-out ones are not asked."""

    name = "reading"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def is_held_out(self, person: Person, other: Word) -> bool:
        return is_held_out(self.seed, self.name, person.name.en, other.en)

    def draw(self, rng: Random, held_out: bool) -> tuple[str, list[Scene], list[Scene]]:
        """`owns` or `is in`; two or three scenes that share nothing; and those on the given side."""
        about, count = rng.choice(["owns", "is in"]), rng.randint(2, 3)
        scenes: list[Scene] = []
        while len(scenes) < count:
            scene = Scene(rng.choice(self.people), *map(rng.choice, (THINGS, COLOURS, ROOMS)))
            fresh = not any(part is other for one in scenes for part, other in zip(one, scene, strict=True))
            if fresh:
                scenes.append(scene)
        on_side = [s for s in scenes if self.is_held_out(s.person, s.thing if about == "owns" else s.room) == held_out]
        return (about, scenes, on_side) if on_side else self.draw(rng, held_out)

    def say(self, rng: Random, language: str, item: tuple[str, list[Scene], list[Scene]]) -> Matter:
        about, scenes, on_side = item
        told = [fill(rng, OWNS if about == "owns" else IS_IN, language, **scene.words(language)) for scene in scenes]
        asked = [self._ask_of(rng, language, about, scene) for scene in on_side]
        return Matter((" " if language == "en" else "").join(told), asked)

    def tell(self, rng: Random, language: str) -> str:
        """A story; or a list of who has what, and the same list in another order: looking up in its plainest form."""
        if rng.random() < 0.7:
            return super().tell(rng, language)
        count, values = rng.randint(3, 6), rng.choice([COLOURS, ROOMS, THINGS])
        keys = rng.sample([person.name for person in self.people], count)
        pairs = list(zip(keys, rng.sample(values, count), strict=True))
        colon = ": " if language == "en" else "："
        lines = [f"{key.text(language)}{colon}{value.text(language)}" for key, value in pairs]
        return "\n".join([*lines, *rng.sample(lines, count)])

    def _ask_of(self, rng: Random, language: str, about: str, scene: Scene) -> Asked:
        what = rng.choice(["colour", "owner", "thing"] if about == "owns" else ["room", "visitor"])
        answer = {"colour": scene.colour, "thing": scene.thing, "room": scene.room}.get(what, scene.person.name)
        words = scene.words(language)
        return Asked(
            fill(rng, QUESTIONS[what], language, **words),
            answer.text(language),
            fill(rng, ANSWERS[what], language, **words),
        )
