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
    """`7+8-5`: two steps, each a pair from the asked side of the split."""
    a, b = arithmetic.pair(rng, held_out)
    total = a + b
    c = rng.randint(1, total - 1)
    while arithmetic.is_held_out(total - c, c) != held_out:
        a, b = arithmetic.pair(rng, held_out)
        total = a + b
        c = rng.randint(1, total - 1)
    answer = total - c
    ask = (
        f"{a}+{b}-{c}=?"
        if rng.random() < 0.5
        else {"en": f"What is {a}+{b}-{c}?", "zh": f"{a}+{b}-{c}等于多少？"}[language]
    )
    stop = ". " if language == "en" else "。"
    return Thought(
        "three_numbers", THINK[language] + ask, f"{a}+{b}={total}{stop}{total}-{c}={answer}{stop.strip()}", str(answer)
    )


def think_chain(rng: Random, language: str, people: list[Person], held_out: bool) -> Thought:
    """The mother of a brother, given both facts. Held out: every pair of relations of which the first is the larger."""
    names = [person.name.text(language) for person in rng.sample(people, 3)]
    first, second = rng.sample(range(len(RELATIVES[language])), 2)
    if (first > second) != held_out:
        first, second = second, first
    words = dict(zip("pqo", names, strict=True), r=RELATIVES[language][first], s=RELATIVES[language][second])
    question, thought = (text.format(**words) for text in CHAIN[language])
    return Thought("chain", THINK[language] + question, thought, names[2])
