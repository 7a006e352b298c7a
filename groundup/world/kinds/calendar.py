"""Days of the week, months and the hours of the clock, counted forwards around their circles."""

from __future__ import annotations

from random import Random

from groundup.world.kinds.kind import Asked, Templates, draw, fill
from groundup.world.split import held_out as is_held_out
from groundup.world.words import DAYS, MONTHS

HOURS = 12
STEPS = {"day": 6, "month": 7, "hour": 9}  # how far forwards a question goes at most; two steps at least
QUESTIONS: dict[str, Templates] = {
    "day": {
        "en": ["Today is {x}. What day is it in {n} days?", "What day comes {n} days after {x}?"],
        "zh": ["今天是{x}，{n}天后是星期几？", "{x}过{n}天是星期几？"],
    },
    "month": {
        "en": ["It is {x}. What month is it in {n} months?", "What month comes {n} months after {x}?"],
        "zh": ["现在是{x}，{n}个月后是几月？", "{x}过{n}个月是几月？"],
    },
    "hour": {
        "en": ["It is {x} o'clock. What time is it in {n} hours?", "What time is it {n} hours after {x} o'clock?"],
        "zh": ["现在是{x}点，{n}小时后是几点？", "{x}点过{n}小时是几点？"],
    },
}
FACTS: dict[str, Templates] = {
    "day": {
        "en": ["{n} days after {x} comes {y}.", "From {x}, {n} days on, is {y}."],
        "zh": ["{x}过{n}天是{y}。", "从{x}起，{n}天后是{y}。"],
    },
    "month": {
        "en": ["{n} months after {x} comes {y}.", "From {x}, {n} months on, is {y}."],
        "zh": ["{x}过{n}个月是{y}。", "从{x}起，{n}个月后是{y}。"],
    },
    "hour": {
        "en": ["{n} hours after {x} o'clock it is {y} o'clock.", "From {x} o'clock, {n} hours on, is {y} o'clock."],
        "zh": ["{x}点过{n}小时是{y}点。", "从{x}点起，{n}小时后是{y}点。"],
    },
}
ANSWERS: Templates = {"en": ["{y} o'clock"], "zh": ["{y}点"]}


class Calendar:
    """`What day comes 3 days after Friday?`: a held-out (start, steps) stands nowhere in training."""

    name = "calendar"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def circle(self, unit: str, language: str) -> list[str]:
        """The names around the circle, in order."""
        if unit == "hour":
            return [str(hour) for hour in range(1, HOURS + 1)]
        return [word.text(language) for word in (DAYS if unit == "day" else MONTHS)]

    def step(self, rng: Random, held_out: bool) -> tuple[str, int, int]:
        """A unit, a place on its circle, and how far to go on."""

        def make() -> tuple[str, int, int]:
            unit = rng.choice(list(STEPS))
            return unit, rng.randrange(len(self.circle(unit, "en"))), rng.randint(2, STEPS[unit])

        return draw(make, lambda key: is_held_out(self.seed, self.name, *key, share=0.15) == held_out)

    def _words(self, language: str, unit: str, start: int, steps: int) -> dict[str, str]:
        circle = self.circle(unit, language)
        return {"x": circle[start], "n": str(steps), "y": circle[(start + steps) % len(circle)]}

    def ask(self, rng: Random, language: str, held_out: bool) -> Asked:
        unit, start, steps = self.step(rng, held_out)
        words = self._words(language, unit, start, steps)
        answer = fill(rng, ANSWERS, language, **words) if unit == "hour" else words["y"]
        return Asked(fill(rng, QUESTIONS[unit], language, **words), answer)

    def tell(self, rng: Random, language: str) -> str:
        """A piece of a circle in order, or a few steps around it."""
        if rng.random() < 0.25:
            circle = self.circle(rng.choice(list(STEPS)), language)
            start = rng.randrange(len(circle))
            return (", " if language == "en" else "、").join((circle * 3)[start : start + rng.randint(5, 12)])
        steps = [self.step(rng, held_out=False) for _ in range(rng.randint(2, 5))]
        return "\n".join(
            fill(rng, FACTS[unit], language, **self._words(language, unit, start, n)) for unit, start, n in steps
        )
