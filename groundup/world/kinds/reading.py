"""Reading: a few sentences about freshly combined people, things, colours and rooms, and a question about one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random

from groundup.world.kinds.kind import Asked, Templates, draw, fill
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
}
ANSWERS: dict[str, Templates] = {
    "colour": {"en": ["{p}'s {t} is {c}."], "zh": ["{p}的{t}是{c}的。"]},
    "owner": {"en": ["The {t} is {p}'s."], "zh": ["{t}是{p}的。"]},
    "thing": {"en": ["{p}'s thing is the {t}."], "zh": ["{p}的东西是{t}。"]},
    "room": {"en": ["So {p} is in the {l}."], "zh": ["所以{p}在{l}。"]},
}


@dataclass(frozen=True)
class Scene:
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


class Reading:
    """Who, where, what and which colour; (person, thing) and (person, room) pairs are held out of every story."""

    name = "reading"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def is_held_out(self, scene: Scene) -> bool:
        return is_held_out(self.seed, self.name, scene.person.name.en, scene.thing.en) or is_held_out(
            self.seed, self.name, scene.person.name.en, scene.room.en
        )

    def scenes(self, rng: Random, held_out: bool) -> list[Scene]:
        """Two to four scenes that share no person, thing, colour or room; all on one side of the split."""
        count = rng.randint(2, 4)

        def make() -> list[Scene]:
            picks = [rng.sample(pool, count) for pool in (self.people, THINGS, COLOURS, ROOMS)]
            return [Scene(*parts) for parts in zip(*picks, strict=True)]

        scenes: list[Scene] = []
        while len(scenes) < count:  # keep the scenes of the right side, whose parts are still unused
            for scene in make():
                used = any(
                    s.person is scene.person or {s.thing, s.colour, s.room} & {scene.thing, scene.colour, scene.room}
                    for s in scenes
                )
                if not used and len(scenes) < count and self.is_held_out(scene) == held_out:
                    scenes.append(scene)
        return scenes

    def _context(self, rng: Random, language: str, scenes: list[Scene], about: str) -> str:
        templates = IS_IN if about == "room" else OWNS
        return (" " if language == "en" else "").join(
            fill(rng, templates, language, **scene.words(language)) for scene in scenes
        )

    def ask(self, rng: Random, language: str, held_out: bool) -> Asked:
        about, scenes = rng.choice(list(QUESTIONS)), self.scenes(rng, held_out)
        scene = rng.choice(scenes)
        question = fill(rng, QUESTIONS[about], language, **scene.words(language))
        parts = {"colour": scene.colour, "owner": scene.person.name, "thing": scene.thing, "room": scene.room}
        return Asked(self._context(rng, language, scenes, about) + "\n" + question, parts[about].text(language))

    def tell(self, rng: Random, language: str) -> str:
        """The scenes, and then what they come to, in another order and other words."""
        about, scenes = rng.choice(list(QUESTIONS)), self.scenes(rng, held_out=False)
        ends = [
            fill(rng, ANSWERS[about], language, **scene.words(language)) for scene in rng.sample(scenes, len(scenes))
        ]
        return self._context(rng, language, scenes, about) + "\n" + (" " if language == "en" else "").join(ends)


QUEUES: Templates = {
    "en": ["The queue: {names}.", "They came in this order: {names}.", "The runners, from first to last: {names}."],
    "zh": ["排队的人：{names}。", "他们到达的顺序：{names}。", "赛跑的名次，从前到后：{names}。"],
}
QUEUE_QUESTIONS: dict[str, Templates] = {
    "after": {"en": ["Who comes right after {p}?"], "zh": ["谁紧跟在{p}后面？"]},
    "before": {"en": ["Who comes right before {q}?"], "zh": ["谁就在{q}前面？"]},
    "last": {"en": ["Who is last?"], "zh": ["谁是最后一个？"]},
}
QUEUE_ANSWERS: dict[str, Templates] = {
    "after": {"en": ["Right after {p} comes {q}."], "zh": ["紧跟在{p}后面的是{q}。"]},
    "before": {"en": ["Right before {q} comes {p}."], "zh": ["就在{q}前面的是{p}。"]},
    "last": {"en": ["The last one is {q}."], "zh": ["最后一个是{q}。"]},
}


class Order:
    """A queue of people and who stands where; two neighbours who are held out stand together in no training queue."""

    name = "order"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def is_held_out(self, first: Person, second: Person) -> bool:
        return is_held_out(self.seed, self.name, first.name.en, second.name.en)

    def queue(self, rng: Random, held_out: bool) -> tuple[list[Person], int]:
        """Three to five people and a place in the queue; its neighbours (place - 1, place) lie on the given side."""

        def make() -> tuple[list[Person], int]:
            people = rng.sample(self.people, rng.randint(3, 5))
            return people, rng.randrange(1, len(people))

        def wanted(drawn: tuple[list[Person], int]) -> bool:
            people, place = drawn
            if held_out:
                return self.is_held_out(people[place - 1], people[place])
            return not any(self.is_held_out(*pair) for pair in pairwise(people))

        return draw(make, wanted)

    def _say(
        self, rng: Random, language: str, people: list[Person], place: int, about: str, templates: dict[str, Templates]
    ) -> str:
        p, q = people[place - 1].name.text(language), people[place].name.text(language)
        return fill(rng, templates[about], language, p=p, q=q)

    def _queue_text(self, rng: Random, language: str, people: list[Person]) -> str:
        names = (", " if language == "en" else "、").join(person.name.text(language) for person in people)
        return fill(rng, QUEUES, language, names=names)

    def ask(self, rng: Random, language: str, held_out: bool) -> Asked:
        people, place = self.queue(rng, held_out)
        about = rng.choice([*QUEUE_QUESTIONS] if place == len(people) - 1 else ["after", "before"])
        question = self._say(rng, language, people, place, about, QUEUE_QUESTIONS)
        answer = people[place - 1 if about == "before" else place].name.text(language)
        return Asked(self._queue_text(rng, language, people) + "\n" + question, answer)

    def tell(self, rng: Random, language: str) -> str:
        people, _ = self.queue(rng, held_out=False)
        ends = []
        for place in rng.sample(range(1, len(people)), len(people) - 1):
            about = rng.choice([*QUEUE_ANSWERS] if place == len(people) - 1 else ["after", "before"])
            ends.append(self._say(rng, language, people, place, about, QUEUE_ANSWERS))
        return self._queue_text(rng, language, people) + "\n" + (" " if language == "en" else "").join(ends)
