"""Who lives in the world: four families of six, and six facts about each person."""

from __future__ import annotations

from dataclasses import dataclass, field

from groundup.world.split import random_for
from groundup.world.words import (
    COLOURS,
    FEMALE_NAMES,
    FOODS,
    INSTRUMENTS,
    MALE_NAMES,
    MONTHS,
    PETS,
    TOWNS,
    Word,
)

ATTRIBUTES: dict[str, list[Word]] = {
    "town": TOWNS,
    "pet": PETS,
    "colour": COLOURS,
    "food": FOODS,
    "instrument": INSTRUMENTS,
    "month": MONTHS,
}


@dataclass
class Person:
    """One person: name, sex (`m` or `f`), the attributes of ATTRIBUTES, and the direct relatives by relation."""

    name: Word
    sex: str
    facts: dict[str, Word]
    relatives: dict[str, Person] = field(default_factory=dict, repr=False)


@dataclass
class Family:
    """Grandfather, grandmother, father, mother, son, daughter; the grandparents are the parents of `side`'s parent.

    side: `paternal` or `maternal`: English has one word for both grandmothers, Chinese has two.
    """

    members: list[Person]
    side: str

    def __post_init__(self) -> None:
        grandfather, grandmother, father, mother, son, daughter = self.members
        marry(grandfather, grandmother)
        marry(father, mother)
        adopt(son, father, mother)
        adopt(daughter, father, mother)
        adopt(father if self.side == "paternal" else mother, grandfather, grandmother)
        son.relatives["sister"], daughter.relatives["brother"] = daughter, son
        for child in (son, daughter):
            child.relatives |= {f"{self.side} grandfather": grandfather, f"{self.side} grandmother": grandmother}
        for elder in (grandfather, grandmother):
            elder.relatives |= {f"{self.side} grandson": son, f"{self.side} granddaughter": daughter}


def marry(husband: Person, wife: Person) -> None:
    husband.relatives["wife"], wife.relatives["husband"] = wife, husband


def adopt(child: Person, father: Person, mother: Person) -> None:
    child.relatives |= {"father": father, "mother": mother}
    for parent in (father, mother):
        parent.relatives["son" if child.sex == "m" else "daughter"] = child


def make_families(seed: int) -> list[Family]:
    """The families of the world of this seed; the same names always, other facts and relations for another seed."""
    rng = random_for(seed, "people")
    men, women = rng.sample(MALE_NAMES, len(MALE_NAMES)), rng.sample(FEMALE_NAMES, len(FEMALE_NAMES))

    def person(sex: str) -> Person:
        facts = {attribute: rng.choice(values) for attribute, values in ATTRIBUTES.items()}
        return Person(men.pop() if sex == "m" else women.pop(), sex, facts)

    families = []
    while men:
        families.append(Family([person(sex) for sex in "mfmfmf"], rng.choice(["paternal", "maternal"])))
    return families
