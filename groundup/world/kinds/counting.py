"""Counting the things of one sort in a mixed list; two sorts that are held out lie in no training basket together."""

from __future__ import annotations

from random import Random

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, fill
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
MOST = 4  # of one sort


class Counting(Kind):
    """`apple, pear, apple. How many apples?`"""

    name = "counting"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def is_held_out(self, sort: Word, items: list[Word]) -> bool:
        """How many of this sort, beside how many others."""
        return is_held_out(self.seed, self.name, sort.en, items.count(sort), len(items))

    def draw(self, rng: Random, held_out: bool) -> tuple[list[Word], list[Word]]:
        """Two sorts, each one to four times, in any order; and the sorts to ask about."""
        sorts = rng.sample(FRUITS, 2)
        items = [sort for sort in sorts for _ in range(rng.randint(1, MOST))]
        on_side = [sort for sort in sorts if self.is_held_out(sort, items) == held_out]
        return (rng.sample(items, len(items)), on_side) if on_side else self.draw(rng, held_out)

    def say(self, rng: Random, language: str, item: tuple[list[Word], list[Word]]) -> Matter:
        items, on_side = item
        listed = (", " if language == "en" else "、").join(thing.text(language) for thing in items)
        asked = []
        for sort in on_side:
            words = {"t": sort.zh, "ts": sort.plural, "n": items.count(sort)}
            question, sentence = (fill(rng, templates, language, **words) for templates in (QUESTIONS, ANSWERS))
            asked.append(Asked(question, str(words["n"]), sentence))
        return Matter(fill(rng, BASKETS, language, items=listed), asked)
