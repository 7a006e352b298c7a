"""Translation of `three red kites`: each word is seen often, a held-out combination of the three nowhere."""

from __future__ import annotations

from random import Random

from groundup.world.kinds.kind import Asked, Templates, draw, fill
from groundup.world.people import Person
from groundup.world.split import held_out as is_held_out
from groundup.world.words import COLOURS, THINGS, Word, counted

QUESTIONS: Templates = {
    "en": [
        "Translate into Chinese: {text}",
        "How do you say this in Chinese: {text}",
        "{text}: what is that in Chinese?",
    ],
    "zh": ["翻译成英文：{text}", "用英文怎么说：{text}", "“{text}”的英文是什么？"],
}
PAIRS: Templates = {
    "en": ["{en} = {zh}", "In Chinese, {en} is {zh}.", "English: {en}\nChinese: {zh}"],
    "zh": ["{zh} = {en}", "{zh}的英文是：{en}。", "中文：{zh}\n英文：{en}"],
}


class Translation:
    """English questions want Chinese, Chinese questions want English."""

    name = "translation"

    def __init__(self, seed: int, people: list[Person]) -> None:
        self.seed, self.people = seed, people

    def phrase(self, rng: Random, held_out: bool) -> tuple[int, Word, Word]:
        """A number from 1 to 9, a colour and a thing."""
        return draw(
            lambda: (rng.randint(1, 9), rng.choice(COLOURS), rng.choice(THINGS)),
            lambda key: is_held_out(self.seed, self.name, key[0], key[1].en, key[2].en) == held_out,
        )

    def ask(self, rng: Random, language: str, held_out: bool) -> Asked:
        phrase = self.phrase(rng, held_out)
        question = fill(rng, QUESTIONS, language, text=counted(*phrase, language))
        return Asked(question, counted(*phrase, "zh" if language == "en" else "en"))

    def tell(self, rng: Random, language: str) -> str:
        """A few phrases, or a person's name, in both languages."""
        lines = []
        for _ in range(rng.randint(2, 4)):
            phrase = self.phrase(rng, held_out=False)
            texts = {lang: counted(*phrase, lang) for lang in ("en", "zh")}
            if rng.random() < 0.3:
                name = rng.choice(self.people).name
                texts = {"en": name.en, "zh": name.zh}
            lines.append(fill(rng, PAIRS, language, **texts))
        return "\n".join(lines)
