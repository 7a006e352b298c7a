"""What does a quickstart learn from? The built-in world, or the user's own files, behind one face."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from groundup.data.read import read_rows
from groundup.data.rows import Chat, Text
from groundup.data.texts import texts
from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.eval.world import Answerer
    from groundup.tokenizer import Tokenizer

SAMPLE = 2000  # documents and chats whose length is measured before the plan is made


@dataclass
class Files:
    """Training files of each stage; an empty list leaves the stage out."""

    pretrain: list[str]
    sft: list[str]


class Corpus(Protocol):
    vocab_size: int

    def texts(self) -> Iterator[str]:
        """What the tokenizer learns from."""

    def sizes(self, tokenizer: Tokenizer) -> dict[str, float | None]:
        """{"pretrain", "sft"}: tokens on offer, None where they are made to measure, 0 where there are none."""

    def files(self, tokenizer: Tokenizer, tokens: dict[str, float]) -> Files:
        """Training files with about this many tokens for each stage (own files: as they are)."""

    def evaluate(self, answer: Answerer) -> dict[str, Any]:
        """Held-out metrics of something that answers; {} where nothing can be graded."""

    def baseline(self) -> dict[str, Any]:
        """The same metrics of the copying baseline."""

    def samples(self) -> list[dict[str, str]]:
        """Held-out questions to show: {"question", "expected"}."""


class WorldData:
    """The built-in world, as much of it as the budget can use."""

    vocab_size = 2688

    def __init__(self, folder: Path, seed: int) -> None:
        from groundup.world import World

        self.folder, self.world = folder, World(seed)

    def texts(self) -> Iterator[str]:
        return self.world.tokenizer_texts()

    def sizes(self, tokenizer: Tokenizer) -> dict[str, float | None]:
        return {"pretrain": None, "sft": None}

    def files(self, tokenizer: Tokenizer, tokens: dict[str, float]) -> Files:
        documents = [len(ids) + 2 for ids in tokenizer.encode_batch(list(self.world.documents(SAMPLE, seed=1)))]
        chats = [len(tokenizer.render(c.messages, c.tools).ids) for c in self.world.chats(SAMPLE, seed=1)]
        self.world.write(
            self.folder,
            documents=round(tokens["pretrain"] / (sum(documents) / SAMPLE)) + 1,
            chats=round(tokens["sft"] / (sum(chats) / SAMPLE)) + 1,
        )
        return Files([str(self.folder / "pretrain.jsonl")], [str(self.folder / "sft.jsonl")])

    def _heldout(self) -> list[Any]:
        return [q for language in ("zh", "en") for q in self.world.questions("heldout", language)]

    def evaluate(self, answer: Answerer) -> dict[str, Any]:
        from groundup.eval.world import evaluate_world

        identity = [q for language in ("zh", "en") for q in self.world.identity_questions("heldout", language)]
        who = evaluate_world(identity, answer)
        return {
            **evaluate_world(self._heldout(), answer),
            "identity_exact_zh": who["world_exact_zh"],
            "identity_exact_en": who["world_exact_en"],
        }

    def baseline(self) -> dict[str, Any]:
        from groundup.eval.world import CopyBaseline, evaluate_world

        train = [q for language in ("zh", "en") for q in self.world.questions("train", language)]
        return evaluate_world(self._heldout(), CopyBaseline(train))

    def samples(self) -> list[dict[str, str]]:
        chosen = []
        for language in ("zh", "en"):
            seen: set[str] = set()
            who = self.world.identity_questions("heldout", language)[:1]
            for question in [*self.world.questions("heldout", language), *who]:
                if question.kind not in seen:
                    seen.add(question.kind)
                    chosen.append({"question": question.messages[-1]["content"], "expected": question.answer})
        return chosen


class OwnData:
    """The user's files: text rows go to pretraining, chats to SFT (without text, the chats' words to both)."""

    vocab_size = 6400

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.text = [path for path in paths if isinstance(self._first(path), Text)]
        self.chat = [path for path in paths if isinstance(self._first(path), Chat)]
        for path in paths:
            if path not in self.text and path not in self.chat:
                raise UserError(
                    path,
                    f"holds {type(self._first(path)).__name__} rows, which pretraining and SFT cannot use",
                    "give text or chat files (docs/formats.md)",
                )

    @staticmethod
    def _first(path: str) -> Any:
        return next(iter(read_rows(path)))

    def texts(self) -> Iterator[str]:
        return texts(self.paths)

    def sizes(self, tokenizer: Tokenizer) -> dict[str, float | None]:
        return {"pretrain": self._tokens(self.text or self.chat, tokenizer), "sft": self._tokens(self.chat, tokenizer)}

    @staticmethod
    def _tokens(paths: list[str], tokenizer: Tokenizer) -> float:
        """About how many tokens the files hold: bytes a token of the first documents, times the files' sizes."""
        total = 0.0
        for path in paths:
            sample = list(islice(texts([path]), SAMPLE))
            ids = sum(len(ids) for ids in tokenizer.encode_batch(sample))
            rows = sum(1 for _ in texts([path]))
            total += ids / len(sample) * rows
        return total

    def files(self, tokenizer: Tokenizer, tokens: dict[str, float]) -> Files:
        return Files(self.text or self.chat, self.chat)

    def evaluate(self, answer: Answerer) -> dict[str, Any]:
        return {}

    def baseline(self) -> dict[str, Any]:
        return {}

    def samples(self) -> list[dict[str, str]]:
        """The first questions of the chat files, whose answers the model may have seen."""
        chosen = []
        for path in self.chat:
            for row in islice(read_rows(path), 3):
                if isinstance(row, Chat):
                    asked, answered = row.messages[0], row.messages[1]
                    chosen.append({"question": asked["content"], "expected": answered["content"]})
        return chosen
