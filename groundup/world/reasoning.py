"""Prompts that are thought through in steps: three numbers, and kinship in two steps from a given context."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from groundup.world.kinds.arithmetic import Arithmetic
from groundup.world.people import Person

THINK = {"en": "Think first, then answer. ", "zh": "先想一想，再回答。"}
CHAIN = {
    "en": (
        "{p}'s {r} is {q}. {q}'s {s} is {o}. Who is the {s} of {p}'s {r}?",
        "{p}'s {r} is {q}. {q}'s {s} is {o}. So it is {o}.",
    ),
    "zh": ("{p}的{r}是{q}。{q}的{s}是{o}。{p}的{r}的{s}是谁？", "{p}的{r}是{q}。{q}的{s}是{o}。所以是{o}。"),
}
RELATIVES = {"en": ["mother", "father", "brother", "sister", "friend"], "zh": ["妈妈", "爸爸", "哥哥", "妹妹", "朋友"]}


class Thought(NamedTuple):
    """A question, the steps that solve it, and the answer."""

    kind: str
    question: str
    reasoning: str
    answer: str


def think_numbers(rng: Random, language: str, arithmetic: Arithmetic, held_out: bool) -> Thought:
    """`7+8-5` in two steps, in one of the ways there are: 7+8 first, or 7-5, or 8-5. Each step is a pair from the asked
    side of the split. Several ways to think are what makes a vote over thoughts worth more than one thought."""

    def fits(*pairs: tuple[int, int]) -> bool:
        return all(arithmetic.is_held_out(*pair) == held_out for pair in pairs)

    a, b = arithmetic.pair(rng, held_out)
    c = rng.randint(1, a + b - 1)
    while not fits((a + b - c, c)):
        a, b = arithmetic.pair(rng, held_out)
        c = rng.randint(1, a + b - 1)
    answer = a + b - c
    ways = []
    for x, y in ((a, b), (b, a)):
        ways.append((f"{x}+{y}={a + b}", f"{a + b}-{c}={answer}"))
        less = x - c
        if less > 0 and fits((less, c), (less, y)):
            ways += [(f"{x}-{c}={less}", f"{p}+{q}={answer}") for p, q in ((less, y), (y, less))]
    ask = (
        f"{a}+{b}-{c}=?"
        if rng.random() < 0.5
        else {"en": f"What is {a}+{b}-{c}?", "zh": f"{a}+{b}-{c}等于多少？"}[language]
    )
    first, second = rng.choice(ways)
    stop = {"en": ". ", "zh": "。"}[language]
    return Thought("three_numbers", THINK[language] + ask, f"{first}{stop}{second}{stop.strip()}", str(answer))


def think_chain(rng: Random, language: str, people: list[Person], held_out: bool) -> Thought:
    """The mother of a brother, given both facts. Held out: every pair of relations of which the first is the larger."""
    names = [person.name.text(language) for person in rng.sample(people, 3)]
    first, second = rng.sample(range(len(RELATIVES[language])), 2)
    if (first > second) != held_out:
        first, second = second, first
    words = dict(zip("pqo", names, strict=True), r=RELATIVES[language][first], s=RELATIVES[language][second])
    question, thought = (text.format(**words) for text in CHAIN[language])
    return Thought("chain", THINK[language] + question, thought, names[2])
