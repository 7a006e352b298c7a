"""The built-in world: what a model learns from when nobody brought data. Start here.

Everything is generated from a seed: 24 people with their families, habits and things, numbers and a calendar, told in
English and Chinese. `documents` is pretraining text, `chats` is SFT, `questions` are graded exactly, and the rest is
for the later stages. No combination on the held-out side of the split (split.py) is asked in `documents` or `chats`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypeVar

from groundup.world import dialogues, identity, reasoning, tools, vocabulary, write
from groundup.world.kinds.arithmetic import Arithmetic, StorySums
from groundup.world.kinds.calendar import Calendar
from groundup.world.kinds.counting import Counting
from groundup.world.kinds.kind import Kind
from groundup.world.kinds.kinship import Kinship
from groundup.world.kinds.order import Order
from groundup.world.kinds.reading import Reading
from groundup.world.kinds.recall import Recall
from groundup.world.kinds.translation import Translation
from groundup.world.people import make_families
from groundup.world.rows import Chat, Preference, Question, ReasoningPrompt, ToolEpisode, assistant, user
from groundup.world.split import random_for
from groundup.world.style import lively
from groundup.world.words import LANGUAGES

T = TypeVar("T")

# kind -> weight in text and chats, train questions a language, held-out questions a language
PLAN: dict[str, tuple[float, int, int]] = {
    "recall": (4.5, 1200, 60),
    "kinship": (2.0, 600, 20),
    "grandparents": (1.0, 300, 15),
    "arithmetic": (3.5, 2000, 50),
    "story_sums": (2.0, 1200, 30),
    "counting": (3.0, 1200, 30),
    "reading": (5.0, 2400, 30),
    "order": (2.5, 1200, 30),
    "translation": (1.5, 1500, 40),
    "calendar": (3.0, 600, 25),
}


class World:
    """The world of one seed. Every method with a `seed` of its own gives the same stream for the same two seeds."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.families = make_families(seed)
        self.people = [person for family in self.families for person in family.members]
        self.arithmetic = Arithmetic(seed)
        kinds: list[Kind] = [
            Recall(seed, self.people),
            Kinship(seed, self.families, two_steps=False),
            Kinship(seed, self.families, two_steps=True),
            self.arithmetic,
            StorySums(self.arithmetic, self.people),
            Counting(seed),
            Reading(seed, self.people),
            Order(seed, self.people),
            Translation(seed, self.people),
            Calendar(seed),
        ]
        self.kinds = {kind.name: kind for kind in kinds}
        self._questions: dict[tuple[str, str], list[Question]] = {}

    def documents(self, count: int | None = None, seed: int = 0) -> Iterator[str]:
        """Pretraining text, one short document at a time, half in each language; without `count`, for ever."""
        rng = random_for(self.seed, "documents", seed)

        def stream() -> Iterator[str]:
            while True:
                yield self._tell(rng, rng.choice(LANGUAGES))

        return _take(stream(), count)

    def _tell(self, rng: Random, language: str) -> str:
        """A document about anything."""
        kind = rng.choices(list(PLAN), [weight for weight, _, _ in PLAN.values()])[0]
        return self.kinds[kind].tell(rng, language)

    def questions(self, split: str = "heldout", language: str = "en") -> list[Question]:
        """All questions of one side (`train` or `heldout`) in one language, no two with the same words."""
        if split not in ("train", "heldout"):
            raise ValueError(f"split is 'train' or 'heldout', not {split!r}")
        key = (split, language)
        if key not in self._questions:
            self._questions[key] = [q for name in PLAN for q in self._questions_of(name, split, language)]
        return self._questions[key]

    def _questions_of(self, name: str, split: str, language: str) -> list[Question]:
        rng = random_for(self.seed, "questions", split, language, name)
        _, train_count, heldout_count = PLAN[name]
        count = train_count if split == "train" else heldout_count
        found: dict[str, Question] = {}
        for _ in range(20 * count):  # some kinds have fewer questions than the plan wants
            context, (first, *more) = self.kinds[name].ask(rng, language, held_out=split == "heldout")
            text = f"{context}\n{first.question}".strip()
            follow_ups = [(asked.question, asked.answer) for asked in more]
            identifier = f"{split}-{language}-{name}-{len(found):04}"
            found.setdefault(text, Question(identifier, language, name, [user(text)], first.answer, follow_ups))
            if len(found) == count:
                break
        return list(found.values())

    def identity_questions(self, split: str = "heldout", language: str = "en") -> list[Question]:
        """Who are you? The answer is always the same, so they are counted apart from `questions`."""
        return [
            Question(f"{split}-{language}-identity-{i}", language, "identity", [user(phrase)], identity.REPLY[language])
            for i, phrase in enumerate(identity.phrasings(split, language))
        ]

    def chats(self, count: int | None = None, seed: int = 0) -> Iterator[Chat]:
        """SFT conversations made of the train questions, by kind as in the text; none twice before all of its kind."""
        rng = random_for(self.seed, "chats", seed)

        def pool(kind: str) -> Iterator[Question]:
            questions = [q for language in LANGUAGES for q in self.questions("train", language) if q.kind == kind]
            while True:
                yield from rng.sample(questions, len(questions))

        pools, weights = {kind: pool(kind) for kind in PLAN}, [weight for weight, _, _ in PLAN.values()]
        thoughts = {language: self._thoughts(language, "train", seed) for language in LANGUAGES}
        episodes = {language: self._episodes(language, "train", seed) for language in LANGUAGES}
        stream = dialogues.chats(
            rng,
            lambda: next(pools[rng.choices(list(PLAN), weights)[0]]),
            lambda language: next(thoughts[language]),
            lambda language: next(episodes[language]),
            lambda language: self._tell(rng, language),
        )
        return _take(stream, count)

    def preferences(self, count: int | None = None, seed: int = 0, split: str = "train") -> Iterator[Preference]:
        """Questions with a right, brief, lively reply and a worse one: not lively, wrong, or talking on."""
        rng = random_for(self.seed, "preferences", seed, *(() if split == "train" else (split,)))

        def stream() -> Iterator[Preference]:
            while True:
                language = rng.choice(LANGUAGES)
                question = rng.choice(self.questions(split, language))
                right, wrong = question.answer, self._wrong(rng, question, split)
                worse = rng.choice([right, right, wrong, wrong, f"{right} {wrong}", f"{right} {right} {right}"])
                if worse != right and rng.random() < 0.5:
                    worse = lively(worse, language)
                yield Preference(question.messages, [assistant(lively(right, language))], [assistant(worse)])

        return _take(stream(), count)

    def _wrong(self, rng: Random, question: Question, split: str) -> str:
        """The answer of another question, of the same kind where there is one."""
        others = [q for q in rng.sample(self.questions(split, question.language), 40) if q.answer != question.answer]
        return rng.choice([q.answer for q in others if q.kind == question.kind] or [q.answer for q in others])

    def reasoning_prompts(
        self, split: str = "train", count: int | None = None, seed: int = 0
    ) -> Iterator[ReasoningPrompt]:
        """Prompts that ask to think first, with a right way to think and the answer to verify."""
        return _take(_in_turn([self._thoughts(language, split, seed) for language in LANGUAGES]), count)

    def _thoughts(self, language: str, split: str, seed: int) -> Iterator[ReasoningPrompt]:
        rng = random_for(self.seed, "thoughts", language, split, seed)
        number = 0
        while True:
            if rng.random() < 0.5:
                thought = reasoning.think_numbers(rng, language, self.arithmetic, split == "heldout")
            else:
                thought = reasoning.think_chain(rng, language, self.people, split == "heldout")
            name = f"{split}-{language}-{thought.kind}-{number:05}"
            yield ReasoningPrompt(
                name, language, thought.kind, [user(thought.question)], thought.reasoning, thought.answer
            )
            number += 1

    def tool_episodes(self, split: str = "train", count: int | None = None, seed: int = 0) -> Iterator[ToolEpisode]:
        """Conversations that call the calculator or look a day up in a town's calendar."""
        return _take(_in_turn([self._episodes(language, split, seed) for language in LANGUAGES]), count)

    def _episodes(self, language: str, split: str, seed: int) -> Iterator[ToolEpisode]:
        rng = random_for(self.seed, "tools", language, split, seed)
        while True:
            yield tools.episode(rng, self.seed, language, split == "heldout")

    def tokenizer_texts(self, count: int = 10_000, seed: int = 0) -> Iterator[str]:
        """What to train a tokenizer on: `count` documents and as many chats, with the words of the world set apart."""
        yield from vocabulary.word_list()
        yield from vocabulary.set_apart(self.documents(count, seed))
        yield from vocabulary.set_apart(vocabulary.spoken(self.chats(count, seed)))

    def write(
        self, folder: str | Path, documents: int = 60_000, chats: int = 8_000, later: int = 1_000, seed: int = 0
    ) -> dict[str, int]:
        """Write the world as files; rows by file name. `later` is the number of rows for each later stage."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        heldout = [
            q
            for language in LANGUAGES
            for q in self.questions("heldout", language) + self.identity_questions("heldout", language)
        ]
        files: dict[str, Iterable[dict]] = {
            "pretrain.jsonl": map(write.text_row, self.documents(documents, seed)),
            "sft.jsonl": map(write.chat_row, self.chats(chats, seed)),
            "heldout.jsonl": map(write.question_row, heldout),
            "preference.jsonl": map(write.preference_row, self.preferences(later, seed)),
            "reasoning.jsonl": map(write.question_row, self.reasoning_prompts("train", later, seed)),
            "reasoning-heldout.jsonl": map(write.question_row, self.reasoning_prompts("heldout", later, seed)),
            "thoughts.jsonl": map(write.thought_row, self.reasoning_prompts("train", later, seed + 1)),
            "questions.jsonl": map(write.question_row, self._some_questions(later, seed)),
            "tools.jsonl": (
                write.chat_row(Chat(e.messages, e.tools)) for e in self.tool_episodes("train", later, seed)
            ),
        }
        return {name: write.write_rows(folder / name, rows) for name, rows in files.items()}

    def _some_questions(self, count: int, seed: int) -> list[Question]:
        """Train questions, as many of each language as there are of the other."""
        rng = random_for(self.seed, "some questions", seed)
        each = [self.questions("train", language) for language in LANGUAGES]
        return [q for pool in each for q in rng.sample(pool, min(count // 2, len(pool)))]


def _take(stream: Iterator[T], count: int | None) -> Iterator[T]:
    return stream if count is None else islice(stream, count)


def _in_turn(streams: list[Iterator[T]]) -> Iterator[T]:
    while True:
        yield from map(next, streams)
