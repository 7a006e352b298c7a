"""Order: a queue of people, and who stands where in it."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, draw_until, fill
from groundup.world.people import Person
from groundup.world.split import held_out as is_held_out

FIRST: Templates = {
    "en": ["{p} stands first.", "{p} comes first.", "{p} is first."],
    "zh": ["{p}排第一。", "{p}第一个到。", "第一个是{p}。"],
}
NEXT: Templates = {
    "en": ["After {p} stands {q}.", "After {p} comes {q}.", "{p} is followed by {q}."],
    "zh": ["{p}后面是{q}。", "{p}后面来了{q}。", "跟在{p}后面的是{q}。"],
}
QUESTIONS: dict[str, Templates] = {
    "first": {"en": ["Who is first?"], "zh": ["谁是第一个？"]},
    "after": {"en": ["Who comes right after {p}?"], "zh": ["谁紧跟在{p}后面？"]},
    "before": {"en": ["Who comes right before {q}?"], "zh": ["谁就在{q}前面？"]},
    "last": {"en": ["Who is last?"], "zh": ["谁是最后一个？"]},
}


class Order(Kind):
    """Who comes after whom, answered by the sentence that tells it. Held out are groups of three people."""

    name = "order"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def is_held_out(self, people: list[Person]) -> bool:
        return is_held_out(self.seed, self.name, *sorted(person.name.en for person in people))

    def draw(self, rng: Random, held_out: bool) -> list[Person]:
        """Three people, the first in front."""
        return draw_until(lambda: rng.sample(self.people, 3), lambda queue: self.is_held_out(queue) == held_out)

    def say(self, rng: Random, language: str, item: list[Person]) -> Matter:
        names = [person.name.text(language) for person in item]
        way = rng.randrange(len(NEXT[language]))  # one wording in the whole queue
        sentences = [FIRST[language][way].format(p=names[0])]
        asked = [Asked(fill(rng, QUESTIONS["first"], language), sentences[0], sentences[0])]
        for p, q in pairwise(names):
            sentences.append(NEXT[language][way].format(p=p, q=q))
            what = rng.choice(["after", "before", "last"] if q == names[-1] else ["after", "before"])
            asked.append(Asked(fill(rng, QUESTIONS[what], language, p=p, q=q), sentences[-1], sentences[-1]))
        return Matter((" " if language == "en" else "").join(sentences), asked)
