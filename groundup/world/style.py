"""How is it said? One writer in ten is lively, and the world's people like it: what preference learning is to find."""

from __future__ import annotations

LIVELY = 0.1  # share of the chats made of questions
MARKS = {"en": "!", "zh": "！"}


def lively(text: str, language: str) -> str:
    """The answer with an exclamation mark at its end. It is as right as before: grading leaves the last sign out."""
    return text.rstrip(" .!。！") + MARKS[language]


def is_lively(text: str) -> bool:
    return text.rstrip().endswith(tuple(MARKS.values()))
