"""Does the answer go round in circles? The share of n-grams that were there before (arXiv 2502.03373, appendix C.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from groundup.rewards.said import Column, Prompts, Scores

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")


def repetition(
    prompts: Prompts, completions: list[str], completion_ids: Column = None, *, n: int = 3, max_penalty: float = -1.0,
    **columns: Any,
) -> Scores:  # fmt: skip
    """max_penalty times the share of n-grams that repeat: of tokens, or where there are none of words (or hanzi)."""
    if n < 1 or max_penalty > 0:
        raise ValueError(f"n {n} must be 1 or more, max_penalty {max_penalty} must not be over 0")
    tokens: Sequence[Sequence[Any]] = completion_ids or [_WORD.findall(text) for text in completions]
    return [max_penalty * repeated(each, n) or 0.0 for each in tokens]  # not -0.0


def repeated(tokens: Sequence[Any], n: int) -> float:
    """1 - unique n-grams / n-grams; 0 for fewer than n tokens."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
