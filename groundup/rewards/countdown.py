"""Does an equation reach the target with every number used once? The puzzle of TinyZero, worked out exactly."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from groundup.rewards.arithmetic import BASIC, evaluate
from groundup.rewards.said import Column, Prompts, Scores, between, column, said


def countdown(
    prompts: Prompts, completions: list[str], nums: Column = None, target: Column = None, *, partial: float = 0.0,
    **columns: Any,
) -> Scores:  # fmt: skip
    """1 where the expression between <answer> and </answer> comes to `target` and uses each of `nums` once; else 0.

    partial: what an expression gets that uses the numbers rightly and misses the target. `.. = target` may follow it.
    """
    count = len(completions)
    rows = zip(completions, column(nums, count), column(target, count), strict=True)
    return [None if n is None or t is None else _grade(text, n, t, partial) for text, n, t in rows]


def _grade(text: str, nums: list[Any], target: Any, partial: float) -> float:
    inside = between(said(text), "answer")
    if inside is None:
        return 0.0
    expression, *results = inside.strip(" \t\r\n$`").strip("*").split("=")
    goal = Fraction(target)
    try:
        worked = evaluate(expression, BASIC)
        shown = [evaluate(result, BASIC) for result in results]
    except ValueError:
        return 0.0
    if len(shown) > 1 or any(result.value != goal or len(result.numbers) != 1 for result in shown):
        return 0.0
    if sorted(worked.numbers) != sorted(map(Fraction, nums)):
        return 0.0
    return 1.0 if worked.value == goal else partial
