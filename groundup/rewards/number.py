"""Is the number the right one? Found where people and models write it: in tags, in \\boxed{}, after ####, or last."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from groundup.rewards.said import Column, Prompts, Scores, alternatives, between, column, said

_USUAL = str.maketrans("０１２３４５６７８９．，％－−＋／", "0123456789.,%--+/")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9.]{1,20})\}\{([0-9.]{1,20})\}")
_LATEX = re.compile(r"\\[,!;%$]|[{}$]")  # thousands (1\,000 and 1{,}000), escaped signs
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+"
_NUMBER = re.compile(
    r"(?<![A-Za-z_0-9])(?<![0-9]\.)"  # H2O holds no number, v1.2 neither
    r"((?<![)\]])[-+])?"  # (10)-5 holds no -5
    rf"(?:([0-9]+)\s{{1,2}}(?=[0-9]+/[0-9]))?({_DIGITS})"  # 2 1/2
    r"(?:[eE]([-+]?[0-9]{1,2})(?![0-9A-Za-z]))?"
    r"(?:\s?/\s?([0-9]+(?:\.[0-9]+)?))?"
    r"(\s?%)?"
)
_LONGEST = 60  # digits


class Number(NamedTuple):
    """percent: it was written with %, so 20 may mean .2."""

    value: Fraction
    percent: bool = False


def number(
    prompts: Prompts, completions: list[str], answer: Column = None, *, tolerance: float = 1e-6, **columns: Any
) -> Scores:
    """1 where the number given in the end is right; else 0. A row whose answer holds no number is not judged.

    tolerance: difference allowed, times the right number where that is over 1. `50%` is .5 or 50, as the right one is.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance {tolerance} must be in [0, 1)")
    right = column(answer, len(completions))
    return [_grade(text, alternatives(a), Fraction(tolerance)) for text, a in zip(completions, right, strict=True)]


def _grade(text: str, answers: list[str], tolerance: Fraction) -> float | None:
    wanted = [found for one in answers if (found := last_number(one))]
    if not wanted:
        return None
    given = last_number(_place(said(text)))
    return float(given is not None and any(_near(given, one, tolerance) for one in wanted))


def _place(text: str) -> str:
    """The part of an answer that its number stands in."""
    inside = between(text, "answer")
    text = text if inside is None else inside
    boxed = _boxed(text)
    return text.rpartition("####")[2] if boxed is None else boxed


def _boxed(text: str) -> str | None:
    """The inside of the last \\boxed{..}, braces within braces included."""
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start + len("\\boxed{") : at]
    return None


def last_number(text: str) -> Number | None:
    """The last number of a text: 1,234.5, -3, .5, 1e3, 3/4, 2 1/2, \\frac{3}{4}, 20%, １２."""
    text = _LATEX.sub("", _FRACTION.sub(r" \1/\2", text.translate(_USUAL)).replace("{,}", ","))
    found = None
    for match in _NUMBER.finditer(text):
        found = _value(match) or found
    return found


def _value(match: re.Match[str]) -> Number | None:
    sign, whole, digits, exponent, below, percent = match.groups()
    if len(match[0]) > _LONGEST:
        return None
    value = Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0)
    if below is not None:
        if not Fraction(below):
            return None
        value /= Fraction(below)
    value += int(whole or 0)
    return Number(-value if sign == "-" else value, percent is not None)


def _near(given: Number, wanted: Number, tolerance: Fraction) -> bool:
    scales = [Fraction(1)]
    if given.percent != wanted.percent:
        scales.append(Fraction(1, 100) if given.percent else Fraction(100))
    far = tolerance * max(Fraction(1), abs(wanted.value))
    return any(abs(given.value * scale - wanted.value) <= far for scale in scales)
