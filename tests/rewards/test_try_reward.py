"""`groundup rewards try`: a reward on answers that are there already."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"prompt": "1+1?", "completion": "2", "answer": "2", "step": 0, "parts": {"exact": 1.0}},  # a line of samples.jsonl
    {"prompt": [{"role": "user", "content": "1+2?"}], "completion": "<think>\nhm\n</think>\n\n4", "answer": "3"},
    {"prompt": "?", "completion": "5", "answer": None},
]


def test_rows_with_completions(groundup: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    report = groundup("rewards", "try", "exact", file, "--json").json()
    assert (report["mean"], report["answers"], report["not_judged"], report["different"]) == (0.5, 3, 1, 2)
    assert [row["reward"] for row in report["rows"]] == [1, 0, None]
    shown = groundup("rewards", "try", "exact", file)
    assert shown.code == 0 and "exact: mean 0.5 of 3 answers, 2 different values, 1 not judged" in shown.out


def test_conversations_and_arguments(groundup: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>a</think>b"}]
    file.write_text(json.dumps({"messages": chat, "kind": "x"}) + "\n", encoding="utf-8")
    assert groundup("rewards", "try", "format", file, "tags=[think]", "--json").json()["mean"] == 0
    assert groundup("rewards", "try", "format", file, "partial=0.5", "--json").json()["mean"] == 0.25
    (tmp_path / "mine.py").write_text(
        "def size(prompts, completions, kind, *, times=1):\n    return [times * len(k) for k in kind]\n",
        encoding="utf-8",
    )
    assert groundup("rewards", "try", "mine.py:size", file, "times=3", "--json").json()["mean"] == 3


@pytest.mark.parametrize(
    ("reward", "row", "says"),
    [
        ("exact", {"prompt": "?", "completion": "2"}, "reward exact: needs answer, the rows have none"),
        ("exact", {"question": "?", "answer": "2"}, "rows.jsonl:1: no answer among question, answer"),
        ("exakt", {"prompt": "?", "completion": "2"}, "did you mean exact?"),
    ],
)
def test_faults(groundup: Callable[..., Any], tmp_path: Path, reward: str, row: dict[str, Any], says: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    result = groundup("rewards", "try", reward, file)
    assert result.code == 2 and says in result.err
