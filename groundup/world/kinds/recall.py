"""Facts about people: told in many paraphrases in pretraining; some (person, attribute) pairs are never asked."""

from __future__ import annotations

from collections import defaultdict
from random import Random

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, answered, draw_until, fill
from groundup.world.people import ATTRIBUTES, Person
from groundup.world.split import held_out as is_held_out
from groundup.world.words import a, join

STATEMENTS: dict[str, Templates] = {
    "town": {
        "en": ["{p} lives in {v}.", "{p}'s home is in {v}.", "{p} has a house in {v}.", "The town of {p} is {v}."],
        "zh": ["{p}住在{v}。", "{p}的家在{v}。", "{p}在{v}有一座房子。", "{p}是{v}人。"],
    },
    "pet": {
        "en": ["{p} keeps {a_v}.", "{p} has {a_v} as a pet.", "The pet of {p} is {a_v}.", "{p} feeds a pet {v}."],
        "zh": ["{p}养了一只{v}。", "{p}的宠物是{v}。", "{p}家里有一只{v}。", "{p}每天喂一只{v}。"],
    },
    "colour": {
        "en": [
            "{p}'s favourite colour is {v}.",
            "The colour {p} likes best is {v}.",
            "{p} loves the colour {v}.",
            "{p} paints everything {v}.",
        ],
        "zh": ["{p}最喜欢的颜色是{v}。", "{p}最爱{v}。", "{p}把什么都涂成{v}。", "在所有颜色里，{p}最喜欢{v}。"],
    },
    "food": {
        "en": [
            "{p}'s favourite food is {v}.",
            "The food {p} likes best is {v}.",
            "{p} loves to eat {v}.",
            "{p} eats {v} every day.",
        ],
        "zh": ["{p}最喜欢的食物是{v}。", "{p}最爱吃{v}。", "{p}每天都吃{v}。", "在所有食物里，{p}最喜欢{v}。"],
    },
    "instrument": {
        "en": [
            "{p} plays the {v}.",
            "The instrument of {p} is the {v}.",
            "{p} is learning the {v}.",
            "{p} is good at the {v}.",
        ],
        "zh": ["{p}会演奏{v}。", "{p}的乐器是{v}。", "{p}正在学{v}。", "{p}擅长演奏{v}。"],
    },
    "month": {
        "en": [
            "{p} was born in {v}.",
            "{p}'s birthday is in {v}.",
            "The birth month of {p} is {v}.",
            "{p} has a birthday party in {v}.",
        ],
        "zh": ["{p}出生在{v}。", "{p}的生日在{v}。", "{p}的出生月份是{v}。", "{p}在{v}过生日。"],
    },
}
QUESTIONS: dict[str, Templates] = {
    "town": {
        "en": ["Where does {p} live?", "In which town does {p} live?", "Where is {p}'s home?"],
        "zh": ["{p}住在哪里？", "{p}的家在哪里？", "{p}是哪里人？"],
    },
    "pet": {
        "en": ["What pet does {p} keep?", "Which animal does {p} have as a pet?", "What is {p}'s pet?"],
        "zh": ["{p}养了什么宠物？", "{p}的宠物是什么？", "{p}家里养什么动物？"],
    },
    "colour": {
        "en": ["What is {p}'s favourite colour?", "Which colour does {p} like best?", "What colour does {p} love?"],
        "zh": ["{p}最喜欢的颜色是什么？", "{p}最爱什么颜色？", "{p}最喜欢哪种颜色？"],
    },
    "food": {
        "en": ["What is {p}'s favourite food?", "Which food does {p} like best?", "What does {p} love to eat?"],
        "zh": ["{p}最喜欢的食物是什么？", "{p}最爱吃什么？", "{p}最喜欢吃什么？"],
    },
    "instrument": {
        "en": ["What instrument does {p} play?", "Which instrument is {p} learning?", "What is {p}'s instrument?"],
        "zh": ["{p}会演奏什么乐器？", "{p}在学什么乐器？", "{p}的乐器是什么？"],
    },
    "month": {
        "en": ["When was {p} born?", "In which month is {p}'s birthday?", "What is {p}'s birth month?"],
        "zh": ["{p}出生在几月？", "{p}的生日在几月？", "{p}在几月过生日？"],
    },
}


class Recall(Kind):
    """`Where does Anna live?`: the answer stands in pretraining text only."""

    name = "recall"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def is_held_out(self, person: Person, attribute: str) -> bool:
        return is_held_out(self.seed, self.name, person.name.en, attribute)

    def draw(self, rng: Random, held_out: bool) -> tuple[Person, str]:
        return draw_until(
            lambda: (rng.choice(self.people), rng.choice(list(ATTRIBUTES))),
            lambda pair: self.is_held_out(*pair) == held_out,
        )

    def say(self, rng: Random, language: str, item: tuple[Person, str]) -> Matter:
        person, attribute = item
        question = fill(rng, QUESTIONS[attribute], language, p=person.name.text(language))
        return Matter("", [Asked(question, self.reply(language, *item), self.state(rng, language, person, attribute))])

    def reply(self, language: str, person: Person, attribute: str) -> str:
        """The one right answer: the fact in the first of its wordings."""
        value = person.facts[attribute].text(language)
        return STATEMENTS[attribute][language][0].format(p=person.name.text(language), v=value, a_v=a(value))

    def state(self, rng: Random, language: str, person: Person, attribute: str) -> str:
        """One fact in one sentence."""
        value = person.facts[attribute].text(language)
        return fill(rng, STATEMENTS[attribute], language, p=person.name.text(language), v=value, a_v=a(value))

    def tell(self, rng: Random, language: str) -> str:
        """The life of one person; or a talk, about pairs that are not held out; or what several people share."""
        between = " " if language == "en" else ""
        way, person = rng.random(), rng.choice(self.people)
        attributes = rng.sample(list(ATTRIBUTES), rng.randint(3, len(ATTRIBUTES)))
        if way < 0.15:
            return self._tell_who_shares(rng, language)
        if way < 0.35:
            asked = [self.say(rng, language, self.draw(rng, held_out=False)).asked[0] for _ in range(rng.randint(2, 5))]
            return answered(rng, language, asked)
        return between.join(self.state(rng, language, person, attribute) for attribute in attributes)

    def _tell_who_shares(self, rng: Random, language: str) -> str:
        attribute = rng.choice(list(ATTRIBUTES))
        groups: dict[str, list[str]] = defaultdict(list)
        for person in rng.sample(self.people, 8):
            groups[person.facts[attribute].text(language)].append(person.name.text(language))
        colon = ": " if language == "en" else "："
        return "\n".join(f"{value}{colon}{join(names, language)}" for value, names in groups.items())
