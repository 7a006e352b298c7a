"""Counting the things of one sort in a mixed list; two sorts that are held out lie in no training basket together."""

from __future__ import annotations

from random import Random

from groundup.world.kinds.kind import Asked, Templates, draw, fill
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
MOST = 5  # of one sort


class Counting:
    """`apple, pear, apple. How many apples?`"""

    name = "counting"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def is_held_out(self, first: Word, second: Word) -> bool:
        return is_held_out(self.seed, self.name, *sorted([first.en, second.en]))

    def basket(self, rng: Random, held_out: bool) -> tuple[list[Word], list[Word]]:
        """Two sorts, and the list in which each lies one to five times, in any order."""
        sorts = draw(lambda: rng.sample(FRUITS, 2), lambda pair: self.is_held_out(*pair) == held_out)
        items = [sort for sort in sorts for _ in range(rng.randint(1, MOST))]
        rng.shuffle(items)
        return sorts, items

    def _list(self, rng: Random, language: str, items: list[Word]) -> str:
        return fill(
            rng, BASKETS, language, items=(", " if language == "en" else "、").join(i.text(language) for i in items)
        )

    def ask(self, rng: Random, language: str, held_out: bool) -> Asked:
        sorts, items = self.basket(rng, held_out)
        question = fill(rng, QUESTIONS, language, t=sorts[0].zh, ts=sorts[0].plural)
        return Asked(self._list(rng, language, items) + "\n" + question, str(items.count(sorts[0])))

    def tell(self, rng: Random, language: str) -> str:
        sorts, items = self.basket(rng, held_out=False)
        ends = [fill(rng, ANSWERS, language, t=sort.zh, ts=sort.plural, n=items.count(sort)) for sort in sorts]
        return self._list(rng, language, items) + "\n" + (" " if language == "en" else "").join(ends)
