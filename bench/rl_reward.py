"""What both sides of the bench call a good answer. It imports nothing, so its process is small."""

from __future__ import annotations

from typing import Any


def digits(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The share of digits in each answer: a text, or as TRL has it the messages of one."""
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]
