"""Days and months counted on around their circles. All steps are told; a held-out (start, steps) is never asked."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, draw_until, fill
from groundup.world.split import held_out as is_held_out
from groundup.world.words import DAYS, MONTHS, Word

CIRCLES: dict[str, list[Word]] = {"day": DAYS, "month": MONTHS}
STEPS = range(2, 7)  # how far on a question goes
QUESTIONS: dict[str, Templates] = {
    "day": {
        "en": ["Today is {x}. What day is it in {n} days?", "What day comes {n} days after {x}?"],
        "zh": ["今天是{x}，{n}天后是星期几？", "{x}过{n}天是星期几？"],
    },
    "month": {
        "en": ["It is {x}. What month is it in {n} months?", "What month comes {n} months after {x}?"],
        "zh": ["现在是{x}，{n}个月后是几月？", "{x}过{n}个月是几月？"],
    },
}
FACTS: dict[str, Templates] = {
    "day": {
        "en": ["{n} days after {x} comes {y}.", "If today is {x}, in {n} days it is {y}."],
        "zh": ["{x}过{n}天是{y}。", "今天是{x}，{n}天后是{y}。"],
    },
    "month": {
        "en": ["{n} months after {x} comes {y}.", "If it is {x}, in {n} months it is {y}."],
        "zh": ["{x}过{n}个月是{y}。", "现在是{x}，{n}个月后是{y}。"],
    },
}


class Step(NamedTuple):
    """`steps` on from place `start` of a circle."""

    unit: str
    start: int
    steps: int


class Calendar(Kind):
    """`What day comes 3 days after Friday?`"""

    name = "calendar"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def any_step(self, rng: Random) -> Step:
        unit = rng.choice(list(CIRCLES))
        return Step(unit, rng.randrange(len(CIRCLES[unit])), rng.choice(STEPS))

    def is_held_out(self, step: Step) -> bool:
        return is_held_out(self.seed, self.name, *step)

    def draw(self, rng: Random, held_out: bool) -> Step:
        return draw_until(lambda: self.any_step(rng), lambda step: self.is_held_out(step) == held_out)

    def say(self, rng: Random, language: str, item: Step) -> Matter:
        circle = [word.text(language) for word in CIRCLES[item.unit]]
        words = {"x": circle[item.start], "n": item.steps, "y": circle[(item.start + item.steps) % len(circle)]}
        question, sentence = (fill(rng, templates[item.unit], language, **words) for templates in (QUESTIONS, FACTS))
        return Matter("", [Asked(question, FACTS[item.unit][language][0].format(**words), sentence)])

    def tell(self, rng: Random, language: str) -> str:
        """A piece of a circle in order, or a few steps around it."""
        if rng.random() < 0.2:
            circle = [word.text(language) for word in CIRCLES[rng.choice(list(CIRCLES))]]
            start = rng.randrange(len(circle))
            return (", " if language == "en" else "、").join((circle * 3)[start : start + rng.randint(5, 12)])
        return "\n".join(
            self.say(rng, language, self.any_step(rng)).asked[0].sentence for _ in range(rng.randint(3, 6))
        )
