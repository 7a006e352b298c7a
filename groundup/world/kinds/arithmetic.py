"""Sums and differences, bare and in stories. Held-out pairs of numbers stand nowhere in training, in no form."""

from __future__ import annotations

from random import Random

from groundup.world.kinds.kind import Asked, Templates, draw, fill
from groundup.world.people import Person
from groundup.world.split import held_out as is_held_out
from groundup.world.words import FRUITS

LARGEST = 49  # of each of the two numbers of a sum, so that sums have two digits
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
    "en": [
        "{p} has {a} {t}. {q} gives {p} {b} more. How many {t} does {p} have now?",
        "There are {a} {t} in the bag. {p} puts in {b} more. How many {t} are in the bag now?",
    ],
    "zh": [
        "{p}有{a}个{t}。{q}又给了{p}{b}个。{p}现在有几个{t}？",
        "袋子里有{a}个{t}。{p}又放进{b}个。现在袋子里有几个{t}？",
    ],
}
LOSSES: Templates = {
    "en": [
        "{p} has {a} {t}. {p} gives {b} of them to {q}. How many {t} does {p} have now?",
        "There are {a} {t} in the bag. {p} takes out {b}. How many {t} are in the bag now?",
    ],
    "zh": [
        "{p}有{a}个{t}。{p}给了{q}{b}个。{p}现在有几个{t}？",
        "袋子里有{a}个{t}。{p}拿走{b}个。现在袋子里有几个{t}？",
    ],
}
STORY_ENDS: Templates = {
    "en": ["Now there are {c}.", "That makes {c} {t}.", "Now the number is {c}."],
    "zh": ["现在有{c}个。", "一共是{c}个{t}。", "现在的数目是{c}。"],
}


class Arithmetic:
    """`What is 17+24?`: the pair 17, 24 is held out with its whole family (24+17, 41-17, 41-24)."""

    name = "arithmetic"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def is_held_out(self, a: int, b: int) -> bool:
        return is_held_out(self.seed, "arithmetic", min(a, b), max(a, b), share=0.12)

    def pair(self, rng: Random, held_out: bool, largest: int = LARGEST) -> tuple[int, int]:
        return draw(
            lambda: (rng.randint(1, largest), rng.randint(1, largest)), lambda pair: self.is_held_out(*pair) == held_out
        )

    def ask(self, rng: Random, language: str, held_out: bool) -> Asked:
        a, b = self.pair(rng, held_out)
        if rng.random() < 0.5:
            return Asked(fill(rng, SUMS, language, a=a, b=b), str(a + b))
        return Asked(fill(rng, DIFFERENCES, language, a=a + b, b=b), str(a))

    def tell(self, rng: Random, language: str) -> str:
        """A page of sums that have one number in common, a page of any sums, or a piece of the number line."""
        way = rng.random()
        if way < 0.15:
            start, step = rng.randint(0, 2 * LARGEST), rng.choice([1, 1, 2, -1])
            line = [start + step * i for i in range(12) if 0 <= start + step * i <= 2 * LARGEST]
            return (", " if language == "en" else "、").join(map(str, line))
        pairs = [self.pair(rng, held_out=False) for _ in range(rng.randint(4, 8))]
        templates, order = rng.choice([SUM_FACTS, DIFFERENCE_FACTS]), rng.randrange(3)
        lines = []
        for a, b in pairs:
            numbers = (a, b, a + b) if templates is SUM_FACTS else (a + b, b, a)
            lines.append(templates[language][order].format(a=numbers[0], b=numbers[1], c=numbers[2]))
        return "\n".join(lines)


class StorySums:
    """`Anna has 5 apples. Tom gives her 3 more.`: the same held-out pairs as bare sums, smaller numbers, in words."""

    name = "story_sums"
    largest = 15

    def __init__(self, arithmetic: Arithmetic, people: list[Person]) -> None:
        self.arithmetic, self.people = arithmetic, people

    def _story(self, rng: Random, language: str, held_out: bool) -> tuple[str, str, dict[str, object]]:
        a, b = self.arithmetic.pair(rng, held_out, self.largest)
        p, q = (person.name.text(language) for person in rng.sample(self.people, 2))
        fruit = rng.choice(FRUITS)
        words: dict[str, object] = {"p": p, "q": q, "t": fruit.plural if language == "en" else fruit.zh}
        if rng.random() < 0.5:
            return fill(rng, GAINS, language, a=a, b=b, **words), str(a + b), words
        return fill(rng, LOSSES, language, a=a + b, b=b, **words), str(a), words

    def ask(self, rng: Random, language: str, held_out: bool) -> Asked:
        story, answer, _ = self._story(rng, language, held_out)
        return Asked(story, answer)

    def tell(self, rng: Random, language: str) -> str:
        """The story with its end instead of the question."""
        story, answer, words = self._story(rng, language, held_out=False)
        stop = ". " if language == "en" else "。"
        end = fill(rng, STORY_ENDS, language, c=answer, t=words["t"])
        return stop.join(story.split(stop)[:-1]) + stop + end
