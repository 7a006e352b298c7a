"""Sums and differences, bare and in stories. Held-out pairs of numbers stand nowhere in training, in no form."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, draw_until, fill
from groundup.world.people import Person
from groundup.world.split import held_out as is_held_out
from groundup.world.words import FRUITS, Word

LARGEST = 20  # of each of the two numbers of a sum
SUMS: Templates = {
    "en": ["{a}+{b}=?", "What is {a}+{b}?", "How much is {a} plus {b}?"],
    "zh": ["{a}+{b}=?", "{a}+{b}等于多少？", "{a}加{b}等于几？"],
}
DIFFERENCES: Templates = {
    "en": ["{a}-{b}=?", "What is {a}-{b}?", "How much is {a} minus {b}?"],
    "zh": ["{a}-{b}=?", "{a}-{b}等于多少？", "{a}减{b}等于几？"],
}
SUM_FACTS: Templates = {
    "en": ["{a}+{b}={c}", "{a}+{b} is {c}.", "{a} plus {b} is {c}."],
    "zh": ["{a}+{b}={c}", "{a}+{b}等于{c}。", "{a}加{b}等于{c}。"],
}
DIFFERENCE_FACTS: Templates = {
    "en": ["{a}-{b}={c}", "{a}-{b} is {c}.", "{a} minus {b} is {c}."],
    "zh": ["{a}-{b}={c}", "{a}-{b}等于{c}。", "{a}减{b}等于{c}。"],
}
GAINS: Templates = {
    "en": ["{p} has {a} {t}. {q} gives {p} {b} more.", "There are {a} {t} in the bag. {p} puts in {b} more."],
    "zh": ["{p}有{a}个{t}。{q}又给了{p}{b}个。", "袋子里有{a}个{t}。{p}又放进{b}个。"],
}
LOSSES: Templates = {
    "en": ["{p} has {a} {t}. {p} gives {b} of them to {q}.", "There are {a} {t} in the bag. {p} takes out {b}."],
    "zh": ["{p}有{a}个{t}。{p}给了{q}{b}个。", "袋子里有{a}个{t}。{p}拿走{b}个。"],
}
STORY_QUESTIONS: Templates = {
    "en": ["How many {t} are there now?", "How many {t} is that now?"],
    "zh": ["现在有几个{t}？", "现在是几个{t}？"],
}
STORY_ENDS: Templates = {
    "en": ["Now {a}{sign}{b}={c}.", "Now it is {c}."],
    "zh": ["现在{a}{sign}{b}={c}。", "现在是{c}个。"],
}


class Arithmetic(Kind):
    """`What is 17+24?`: the pair 17, 24 is held out with its whole family (24+17, 41-17, 41-24)."""

    name = "arithmetic"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def is_held_out(self, a: int, b: int) -> bool:
        return is_held_out(self.seed, "arithmetic", min(a, b), max(a, b), share=0.12)

    def any_pair(self, rng: Random) -> tuple[int, int]:
        return rng.randint(1, LARGEST), rng.randint(1, LARGEST)

    def pair(self, rng: Random, held_out: bool, largest: int = LARGEST) -> tuple[int, int]:
        return draw_until(
            lambda: (rng.randint(1, largest), rng.randint(1, largest)), lambda pair: self.is_held_out(*pair) == held_out
        )

    def draw(self, rng: Random, held_out: bool) -> tuple[int, int]:
        return self.pair(rng, held_out)

    def say(self, rng: Random, language: str, item: tuple[int, int]) -> Matter:
        a, b = item
        plus = Asked(fill(rng, SUMS, language, a=a, b=b), str(a + b), fill(rng, SUM_FACTS, language, a=a, b=b, c=a + b))
        minus = Asked(
            fill(rng, DIFFERENCES, language, a=a + b, b=b),
            str(a),
            fill(rng, DIFFERENCE_FACTS, language, a=a + b, b=b, c=a),
        )
        return Matter("", [rng.choice([plus, minus])])

    def tell(self, rng: Random, language: str) -> str:
        """A page of sums, of any pair: what is held out is told, but never asked. Or a piece of the number line."""
        if rng.random() < 0.1:
            start, step = rng.randint(0, 2 * LARGEST), rng.choice([1, 1, 2, -1])
            line = [start + step * i for i in range(12) if 0 <= start + step * i <= 2 * LARGEST]
            return (", " if language == "en" else "、").join(map(str, line))
        asked = [self.say(rng, language, self.any_pair(rng)).asked[0] for _ in range(rng.randint(4, 8))]
        return "\n".join(a.sentence for a in asked)


class Story(NamedTuple):
    """`a` fruits and `b` more, or `a + b` fruits and `b` less."""

    a: int
    b: int
    gain: bool
    giver: Person
    taker: Person
    fruit: Word


class StorySums(Kind):
    """`Anna has 5 apples. Tom gives her 3 more.`: the same held-out pairs as bare sums, smaller numbers, in words."""

    name = "story_sums"
    largest = 9

    def __init__(self, arithmetic: Arithmetic, people: list[Person]) -> None:
        self.arithmetic, self.people = arithmetic, people

    def draw(self, rng: Random, held_out: bool) -> Story:
        a, b = self.arithmetic.pair(rng, held_out, self.largest)
        giver, taker = rng.sample(self.people, 2)
        return Story(a, b, rng.random() < 0.5, giver, taker, rng.choice(FRUITS))

    def say(self, rng: Random, language: str, item: Story) -> Matter:
        fruit = item.fruit.plural if language == "en" else item.fruit.zh
        names = {"p": item.taker.name.text(language), "q": item.giver.name.text(language), "t": fruit}
        first, result = (item.a, item.a + item.b) if item.gain else (item.a + item.b, item.a)
        context = fill(rng, GAINS if item.gain else LOSSES, language, a=first, b=item.b, **names)
        end = fill(rng, STORY_ENDS, language, a=first, b=item.b, c=result, sign="+" if item.gain else "-")
        return Matter(context, [Asked(fill(rng, STORY_QUESTIONS, language, t=fruit), str(result), end)])
