"""What is said of rows that were cut or left out: as many as there are, by their right name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import chat

from groundup.data.shards import tokenize_files
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer

Write = Callable[..., str]
SHORT, LONG = "mat.", "mat " * 60


def pair(chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": "cat?", "chosen": chosen, "rejected": rejected}


def judged(answer: str) -> dict[str, Any]:
    return {"prompt": "cat?", "completion": answer, "label": True}


def steps(count: int) -> dict[str, Any]:
    return {"prompt": "cat?", "completions": ["the mat"] * count, "labels": [True] * count}


@pytest.mark.parametrize(
    ("kind", "rows", "says"),
    [
        ("chat", [chat("cat?", SHORT), chat("cat?", LONG)], "1 of 2 conversations"),
        ("preference", [pair(SHORT, "cat."), pair(LONG, SHORT), pair(SHORT, LONG)], "2 of 3 pairs"),
        ("unpaired", [pair(SHORT, "cat."), pair(LONG, SHORT)], "1 of 4 judged answers"),
        ("unpaired", [judged(SHORT), judged(LONG), judged(LONG)], "2 of 3 judged answers"),
        ("stepwise", [steps(1), steps(20), steps(2)], "1 of 3 solutions"),
    ],
)
def test_what_is_cut_is_counted_as_the_rows_are(
    tokenizer: Tokenizer,
    write: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    rows: Any,
    says: str,
):
    made = tokenize_files([write("a.jsonl", rows)], tokenizer, kind, tmp_path / "c", max_len=60)
    count, of = (int(word) for word in says.split() if word.isdigit())
    assert (made.meta["truncated_rows"], made.meta["rows"], made.meta["bad_rows"]) == (count, of, 0)
    assert f"{says} cut to a row (" in caplog.text


def test_pairs_that_train_nothing_are_counted_as_pairs(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    """Also where they were cut before: what is left out is not told of as cut."""
    for good, fails in ((99, False), (98, True)):
        file = write(f"{good}.jsonl", [*(pair(f"mat {n}", "cat") for n in range(good)), pair(LONG + "a", LONG + "b")])
        if fails:
            with pytest.raises(UserError, match=r"98\.jsonl:99: 1 of 99 pairs train nothing"):
                tokenize_files([file], tokenizer, "preference", tmp_path / "c", max_len=60)
        else:
            made = tokenize_files([file], tokenizer, "preference", tmp_path / "c", max_len=60)
            counted = {name: made.meta[name] for name in ("rows", "documents", "dropped_rows", "truncated_rows")}
            assert counted == {"rows": 100, "documents": 198, "dropped_rows": 1, "truncated_rows": 0}
