"""What both sides of `bench.rl` read: the same questions, the same pairs, the same reward model, as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.material import real

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

QUESTIONS, PAIRS = ("reasoning/gsm8k_train.jsonl",), ("preference/dpo_en.jsonl",)
SMALL = 8192  # entries of a vocabulary below which a model knows little but the built-in world
MOST = 5000  # rows of that world that are looked at, at most


def write_prompts(path: Path, tokenizer: Tokenizer, count: int, longest: int) -> tuple[int, str]:
    """`count` questions of at most `longest` tokens, as messages. Returns (tokens of the longest one, their source)."""
    files = source(tokenizer, QUESTIONS)
    measured = ({"prompt": m, "length": len(tokenizer.render(m, None, True).ids)} for m in _questions(files))
    rows = _write(path, measured, count, longest)
    return max(row["length"] for row in rows), _name(files)


def write_pairs(path: Path, tokenizer: Tokenizer, count: int, longest: int) -> str:
    """`count` pairs that nobody cuts: each conversation has at most `longest` tokens. `length` is that of the longer
    one, by which TRL may sort. Returns their source."""
    files = source(tokenizer, PAIRS)
    size = lambda pair, answer: len(tokenizer.render(pair.prompt + answer).ids)  # noqa: E731
    measured = (
        {
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "length": max(size(pair, pair.chosen), size(pair, pair.rejected)),
        }
        for pair in _pairs(files)
    )
    _write(path, measured, count, longest)
    return _name(files)


def source(tokenizer: Tokenizer, names: tuple[str, ...]) -> list[Path]:
    """Real files; none, for the built-in world, where they are missing or the model knows little but that world."""
    return [] if tokenizer.vocab_size < SMALL else real(names)


def write_reward_model(folder: Path, model: Path) -> None:
    """A reward model as large as the policy, its head untrained: what it says costs the same."""
    import torch

    from groundup.model.io import load_model
    from groundup.model.scored import begin_scored, save_scorer
    from groundup.tokenizer import load_tokenizer

    if not (folder / "config.json").exists():
        save_scorer(begin_scored(load_model(model, dtype=torch.float32), 0), folder)
        load_tokenizer(model).save(folder)


def read_rows(path: str) -> list[dict[str, Any]]:
    """For the peers: they have no reader of ours."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _questions(files: list[Path]) -> Iterator[list[Any]]:
    from groundup.data.read import Reader
    from groundup.world import World

    if files:
        return (row.messages for row in Reader(files[0]))  # type: ignore[union-attr]
    return (question.messages for question in World(0).reasoning_prompts(count=MOST))


def _pairs(files: list[Path]) -> Iterator[Any]:
    from groundup.data.read import Reader
    from groundup.world import World

    return iter(Reader(files[0])) if files else World(0).preferences(MOST)


def _name(files: list[Path]) -> str:
    return files[0].name if files else "the built-in world"


def _write(path: Path, measured: Iterable[dict[str, Any]], count: int, longest: int) -> list[dict[str, Any]]:
    """The first `count` rows that are short enough."""
    rows = list(islice((row for row in measured if row["length"] <= longest), count))
    if len(rows) < count:
        raise SystemExit(f"bench: {count} rows are asked for, and only {len(rows)} have at most {longest} tokens")
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return rows
