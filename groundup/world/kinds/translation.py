"""Translation of `three red kites`: each word is seen often, a held-out combination of the three nowhere."""

from __future__ import annotations

from random import Random

from groundup.world.kinds.kind import Asked, Kind, Matter, Templates, draw_until, fill
from groundup.world.people import Person
from groundup.world.split import held_out as is_held_out
from groundup.world.words import COLOURS, THINGS, Word, counted

QUESTIONS: Templates = {
    "en": ["Translate into Chinese: {text}", "How do you say this in Chinese: {text}", "Say in Chinese: {text}"],
    "zh": ["翻译成英文：{text}", "用英文怎么说：{text}", "译成英文：{text}"],
}
PAIRS: Templates = {
    "en": ["{en} = {zh}", "In Chinese, {en} is {zh}.", "English: {en}\nChinese: {zh}"],
    "zh": ["{zh} = {en}", "{zh}的英文是：{en}。", "中文：{zh}\n英文：{en}"],
}
Phrase = tuple[int, Word, Word]  # number, colour, thing


class Translation(Kind):
    """English questions want Chinese, Chinese questions want English."""

    name = "translation"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def draw(self, rng: Random, held_out: bool) -> Phrase:
        """A number from 1 to 9, a colour and a thing."""
        return draw_until(
            lambda: (rng.randint(1, 9), rng.choice(COLOURS), rng.choice(THINGS)),
            lambda key: is_held_out(self.seed, self.name, key[0], key[1].en, key[2].en) == held_out,
        )

    def say(self, rng: Random, language: str, item: Phrase) -> Matter:
        texts = {each: counted(*item, each) for each in ("en", "zh")}
        question = fill(rng, QUESTIONS, language, text=texts[language])
        answer = texts["zh" if language == "en" else "en"]
        return Matter("", [Asked(question, answer, fill(rng, PAIRS, language, **texts))])

    def tell(self, rng: Random, language: str) -> str:
        """A few phrases and names in both languages."""
        lines = []
        for _ in range(rng.randint(2, 4)):
            lines.append(self.say(rng, language, self.draw(rng, held_out=False)).asked[0].sentence)
            if rng.random() < 0.5:
                name = rng.choice(self.people).name
                lines.append(fill(rng, PAIRS, language, en=name.en, zh=name.zh))
        return "\n".join(lines)
