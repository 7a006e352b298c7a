"""Is the answer as long as it should be? In tokens, where the sampler says them (column completion_ids)."""

from __future__ import annotations

from typing import Any

from groundup.rewards.said import Column, Prompts, Scores


def length(
    prompts: Prompts, completions: list[str], completion_ids: Column = None, *, low: int = 0, high: int,
    soft: int = 0, unit: str = "tokens", **columns: Any,
) -> Scores:  # fmt: skip
    """1 from `low` to `high`, falling to 0 over `soft` more or fewer. unit: tokens, characters or words."""
    if not 0 <= low <= high or soft < 0:
        raise ValueError(f"low {low}, high {high}, soft {soft}: it must be 0 <= low <= high and 0 <= soft")
    lengths = _lengths(completions, completion_ids, unit)
    outside = [max(low - size, size - high, 0) for size in lengths]
    return [max(0.0, 1 - far / soft) if soft else float(far == 0) for far in outside]


def overlong(
    prompts: Prompts, completions: list[str], completion_ids: Column = None, *, max_tokens: int, buffer: int,
    **columns: Any,
) -> Scores:  # fmt: skip
    """0 up to max_tokens - buffer tokens, falling to -1 at max_tokens (DAPO, arXiv 2503.14476, equation 13)."""
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer {buffer} must be in [1, max_tokens], max_tokens is {max_tokens}")
    lengths = _lengths(completions, completion_ids, "tokens")
    return [0.0 - min(1.0, max(0.0, (size - max_tokens + buffer) / buffer)) for size in lengths]


def _lengths(completions: list[str], ids: Column, unit: str) -> list[int]:
    if unit == "characters":
        return [len(text) for text in completions]
    if unit == "words":
        return [len(text.split()) for text in completions]
    if unit != "tokens":
        raise ValueError(f"unit {unit!r} must be tokens, characters or words")
    if ids is None and completions:
        raise ValueError("nobody says how many tokens the answers have: there is no column completion_ids")
    return [len(each) for each in ids or []]
