"""Who is whose mother: parents and partners are told; the two-step relations (grandmother) are partly never told."""

from __future__ import annotations

from random import Random

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, answered, draw_until, fill
from groundup.world.people import Family, Person
from groundup.world.split import held_out as is_held_out
from groundup.world.words import Word

RELATIONS: dict[str, Word] = {
    "mother": Word("mother", "妈妈"),
    "father": Word("father", "爸爸"),
    "wife": Word("wife", "妻子"),
    "husband": Word("husband", "丈夫"),
    "son": Word("son", "儿子"),
    "daughter": Word("daughter", "女儿"),
    "brother": Word("brother", "哥哥"),
    "sister": Word("sister", "妹妹"),
    "paternal grandmother": Word("grandmother", "奶奶"),
    "maternal grandmother": Word("grandmother", "外婆"),
    "paternal grandfather": Word("grandfather", "爷爷"),
    "maternal grandfather": Word("grandfather", "外公"),
    "paternal grandson": Word("grandson", "孙子"),
    "maternal grandson": Word("grandson", "外孙"),
    "paternal granddaughter": Word("granddaughter", "孙女"),
    "maternal granddaughter": Word("granddaughter", "外孙女"),
}
STATEMENTS: Templates = {
    "en": ["{p}'s {r} is {q}.", "{q} is the {r} of {p}.", "The {r} of {p} is {q}.", "{q} is {p}'s {r}."],
    "zh": ["{p}的{r}是{q}。", "{q}是{p}的{r}。", "{p}的{r}叫{q}。", "{p}有个{r}，叫{q}。"],
}
QUESTIONS: Templates = {
    "en": ["Who is {p}'s {r}?", "Who is the {r} of {p}?", "What is the name of {p}'s {r}?"],
    "zh": ["{p}的{r}是谁？", "谁是{p}的{r}？", "{p}的{r}叫什么名字？"],
}


Fact = tuple[Person, str, Person]  # person, relation, the relative


class Kinship(Kind):
    """`Who is Anna's mother?` (told, not asked) and `Who is Anna's grandmother?` (for some, neither told nor asked)."""

    def __init__(self, seed: int, families: list[Family], two_steps: bool) -> None:
        self.seed, self.families = seed, families
        self.name = "grandparents" if two_steps else "kinship"
        self.facts: list[Fact] = [
            (person, relation, other)
            for family in families
            for person in family.members
            for relation, other in person.relatives.items()
            if ("grand" in relation) == two_steps
        ]

    def is_held_out(self, person: Person, other: Person) -> bool:
        """Both directions between two people lie on the same side."""
        return is_held_out(self.seed, self.name, *sorted([person.name.en, other.name.en]))

    def draw(self, rng: Random, held_out: bool) -> Fact:
        return draw_until(lambda: rng.choice(self.facts), lambda fact: self.is_held_out(fact[0], fact[2]) == held_out)

    def say(self, rng: Random, language: str, item: Fact) -> Matter:
        person, relation, other = item
        p, q, r = person.name.text(language), other.name.text(language), RELATIONS[relation].text(language)
        return Matter(
            "", [Asked(fill(rng, QUESTIONS, language, p=p, r=r), q, fill(rng, STATEMENTS, language, p=p, q=q, r=r))]
        )

    def tell(self, rng: Random, language: str) -> str:
        """Facts about one family, the asked ones sometimes as a talk; a held-out two-step relation is never told."""
        members = rng.choice(self.families).members
        told = [fact for fact in self.facts if fact[0] in members]
        talk = rng.random() < 0.25
        if talk or self.name == "grandparents":
            told = [fact for fact in told if not self.is_held_out(fact[0], fact[2])]
        told = rng.sample(told, min(len(told), rng.randint(3, 6)))
        asked = [self.say(rng, language, fact).asked[0] for fact in told]
        if talk:
            return answered(rng, language, asked)
        return (" " if language == "en" else "").join(a.sentence for a in asked)
