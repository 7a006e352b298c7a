"""Counting the things of one sort in a list of two."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, draw_until, fill
from groundup.world.split import held_out as is_held_out
from groundup.world.words import FRUITS, Word

BASKETS: Templates = {
    "en": ["In the basket: {items}.", "On the table: {items}.", "In the box: {items}."],
    "zh": ["篮子里有：{items}。", "桌子上有：{items}。", "盒子里有：{items}。"],
}
QUESTIONS: Templates = {
    "en": ["How many {ts} are there?", "Count the {ts}."],
    "zh": ["有几个{t}？", "数一数{t}有几个。"],
}
ANSWERS: Templates = {"en": ["The number of {ts}: {n}."], "zh": ["{t}的个数：{n}。"]}
MOST = 3  # of one sort


class Counting(Kind):
    """`apple, pear, apple. How many apples?` Held out are pairs of sorts that lie in a basket together."""

    name = "counting"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def is_held_out(self, sorts: Iterable[Word]) -> bool:
        return is_held_out(self.seed, self.name, *sorted(sort.en for sort in sorts))

    def draw(self, rng: Random, held_out: bool) -> list[Word]:
        """Two sorts, each one to MOST times, in any order."""
        sorts = draw_until(lambda: rng.sample(FRUITS, 2), lambda pair: self.is_held_out(pair) == held_out)
        items = [sort for sort in sorts for _ in range(rng.randint(1, MOST))]
        return rng.sample(items, len(items))

    def say(self, rng: Random, language: str, item: list[Word]) -> Matter:
        listed = (", " if language == "en" else "、").join(thing.text(language) for thing in item)
        asked = []
        for sort in dict.fromkeys(item):
            words = {"t": sort.zh, "ts": sort.plural, "n": item.count(sort)}
            question, sentence = (fill(rng, templates, language, **words) for templates in (QUESTIONS, ANSWERS))
            asked.append(Asked(question, str(words["n"]), sentence))
        return Matter(fill(rng, BASKETS, language, items=listed), asked)
