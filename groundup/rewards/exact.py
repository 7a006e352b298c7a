"""Is the answer the right one, word for word? Case, white space, final punctuation and marks around do not count."""

from __future__ import annotations

import unicodedata
from typing import Any

from groundup.rewards.said import Column, Prompts, Scores, alternatives, column, final

_AROUND = " \"'`*“”‘’「」『』"
_BEHIND = _AROUND + ".!?,;:。、"  # full-width signs have become these


def exact(
    prompts: Prompts, completions: list[str], answer: Column = None, *, ignore_case: bool = True, **columns: Any
) -> Scores:
    """1 where what is said in the end, or between <answer> and </answer>, is one of the right answers; else 0."""
    right = column(answer, len(completions))
    return [_same(text, alternatives(a), ignore_case) for text, a in zip(completions, right, strict=True)]


def _same(text: str, answers: list[str], ignore_case: bool) -> float | None:
    if not answers:
        return None
    return float(normalise(final(text), ignore_case) in {normalise(one, ignore_case) for one in answers})


def normalise(text: str, ignore_case: bool = True) -> str:
    """The words to compare. Full-width letters, digits and signs become the usual ones (NFKC)."""
    words = " ".join(unicodedata.normalize("NFKC", text).split())
    bare = words.lstrip(_AROUND).rstrip(_BEHIND) or words  # an answer of signs alone stays
    return bare.casefold() if ignore_case else bare
