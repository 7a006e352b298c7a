"""Order: a queue of people, and who stands where in it."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, draw_until, fill
from groundup.world.people import Person
from groundup.world.split import held_out as is_held_out

QUEUES: Templates = {
    "en": ["The queue: {names}.", "They came in this order: {names}.", "The runners, from first to last: {names}."],
    "zh": ["排队的人：{names}。", "他们到达的顺序：{names}。", "赛跑的名次，从前到后：{names}。"],
}
QUESTIONS: dict[str, Templates] = {
    "after": {"en": ["Who comes right after {p}?"], "zh": ["谁紧跟在{p}后面？"]},
    "before": {"en": ["Who comes right before {q}?"], "zh": ["谁就在{q}前面？"]},
    "last": {"en": ["Who is last?"], "zh": ["谁是最后一个？"]},
}
ANSWERS: dict[str, Templates] = {
    "after": {"en": ["Right after {p} comes {q}."], "zh": ["紧跟在{p}后面的是{q}。"]},
    "before": {"en": ["Right before {q} comes {p}."], "zh": ["就在{q}前面的是{p}。"]},
    "last": {"en": ["The last one is {q}."], "zh": ["最后一个是{q}。"]},
}


class Order(Kind):
    """Who comes after whom; neighbours who are held out may stand in any queue, but are not asked about."""

    name = "order"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def is_held_out(self, first: Person, second: Person) -> bool:
        return is_held_out(self.seed, self.name, first.name.en, second.name.en)

    def draw(self, rng: Random, held_out: bool) -> tuple[list[Person], list[int]]:
        """Three or four people, and the places whose pair (the person in front, this one) is on the given side."""

        def make() -> tuple[list[Person], list[int]]:
            people = rng.sample(self.people, rng.randint(3, 4))
            return people, [i + 1 for i, pair in enumerate(pairwise(people)) if self.is_held_out(*pair) == held_out]

        return draw_until(make, lambda queue: bool(queue[1]))

    def say(self, rng: Random, language: str, item: tuple[list[Person], list[int]]) -> Matter:
        people, places = item
        names = [person.name.text(language) for person in people]
        asked = []
        for place in places:
            what = rng.choice([*QUESTIONS] if place == len(people) - 1 else ["after", "before"])
            words = {"p": names[place - 1], "q": names[place]}
            question, sentence = (fill(rng, templates[what], language, **words) for templates in (QUESTIONS, ANSWERS))
            asked.append(Asked(question, words["p" if what == "before" else "q"], sentence))
        queue = fill(rng, QUEUES, language, names=(", " if language == "en" else "、").join(names))
        return Matter(queue, asked)
