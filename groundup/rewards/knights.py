"""Who is a knight and who is a knave? Everybody must be named rightly; what is said last of somebody counts."""

from __future__ import annotations

import re
from typing import Any

from groundup.rewards.said import Column, Prompts, Scores, column, final

_SPOKEN = re.compile(r"([^\n()]+?) is a (knight|knave)", re.IGNORECASE)


def knights_knaves(
    prompts: Prompts, completions: list[str], solution_text_format: Column = None, solution: Column = None,
    names: Column = None, **columns: Any,
) -> Scores:  # fmt: skip
    """1 where each person is said to be what they are; else 0.

    Columns: names and solution (true for a knight), or solution_text_format ("(1) Ann is a knight\\n(2) ..").
    """
    count = len(completions)
    rows = zip(column(solution_text_format, count), column(solution, count), column(names, count), strict=True)
    return [_grade(text, _people(*row)) for text, row in zip(completions, rows, strict=True)]


def _people(spoken: Any, solution: Any, names: Any) -> dict[str, str]:
    """name -> knight or knave, in small letters."""
    if isinstance(names, (list, tuple)) and isinstance(solution, (list, tuple)) and len(names) == len(solution):
        return {str(n).lower(): "knight" if k else "knave" for n, k in zip(names, solution, strict=True)}
    found = _SPOKEN.findall(spoken) if isinstance(spoken, str) else []
    return {name.strip().lower(): kind.lower() for name, kind in found}


def _grade(text: str, people: dict[str, str]) -> float | None:
    if not people:
        return None
    who = "|".join(re.escape(name) for name in sorted(people, key=len, reverse=True))
    claim = re.compile(rf"\b({who})(?: is(?: an?)?|\s?[:=-])\s?(?:an? )?(knight|knave)\b")
    claims = dict(claim.findall(final(text).lower().replace("*", "")))
    return float(claims == people)
