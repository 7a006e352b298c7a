"""Is the answer in its form? `<think>..</think><answer>..</answer>`, each once, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from groundup.rewards.said import Prompts, Scores


def tagged(
    prompts: Prompts, completions: list[str], *, tags: Sequence[str] = ("think", "answer"), partial: float = 0.0,
    **columns: Any,
) -> Scores:  # fmt: skip
    """1 where the blocks stand there in this order, each once, none empty, with white space alone between; else 0.

    tags: "" as the last one stands for text in no tags, as chat models answer behind their thought: ["think", ""].
    partial: times the share of marks that stand there exactly once, for an answer that is not in its form.
    """
    if isinstance(tags, str) or not any(tags) or "" in tags[:-1]:
        raise ValueError('tags must be a list of names, like ["think", "answer"] or ["think", ""]')
    return [1.0 if well_formed(text, tags) else partial * _share(text, tags) for text in completions]


def well_formed(text: str, tags: Sequence[str]) -> bool:
    """Is the text made of these blocks and nothing else?"""
    if _share(text, tags) < 1:
        return False
    for tag in filter(None, tags):
        text = text.lstrip()
        inside, _, rest = text.partition(f"</{tag}>")
        if not inside.startswith(f"<{tag}>") or not inside[len(tag) + 2 :].strip():
            return False
        text = rest
    return bool(text.strip()) == (tags[-1] == "")


def _share(text: str, tags: Sequence[str]) -> float:
    marks = [mark for tag in tags if tag for mark in (f"<{tag}>", f"</{tag}>")]
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)
