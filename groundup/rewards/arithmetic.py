"""What does an expression come to? Read by precedence, in exact fractions; nothing is ever evaluated as a program."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from typing import NamedTuple

_USUAL = str.maketrans("０１２３４５６７８９．＋－−×✕·÷／（）［］【】^", "0123456789.+--***//()()()^")
_LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}
_TOKEN = re.compile(r"\s*(?:((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)|(\*\*|//|[-+*/%^()]))")
_LONGEST = 1000  # characters
_BITS = 4096  # of a numerator or denominator


class Worked(NamedTuple):
    """The value, and the numbers that were written, in their order."""

    value: Fraction
    numbers: list[Fraction]


class _Operator(NamedTuple):
    rank: int
    apply: Callable[[Fraction, Fraction], Fraction]


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("a power that is no whole number")
    if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > _BITS:
        raise ValueError("the number is too large")
    result = base**exponent
    assert isinstance(result, Fraction)  # exponent is whole
    return result


_OPERATORS = {
    "+": _Operator(1, operator.add), "-": _Operator(1, operator.sub),
    "*": _Operator(2, operator.mul), "/": _Operator(2, operator.truediv),
    "//": _Operator(2, lambda a, b: Fraction(a // b)), "%": _Operator(2, operator.mod),
    "negative": _Operator(3, lambda _, b: -b), "positive": _Operator(3, lambda _, b: b),
    "**": _Operator(4, _power),
}  # fmt: skip
BASIC = frozenset("+-*/")


def evaluate(text: str, allowed: frozenset[str] = frozenset(_OPERATORS)) -> Worked:
    """The value of numbers, + - * / // % ** (or ^) and parentheses. ValueError, in words, for anything else.

    allowed: the operators that may be used. Dijkstra's two stacks: nothing nests, so no depth of parentheses overflows.
    """
    values: list[Fraction] = []
    waiting: list[str] = []
    numbers: list[Fraction] = []
    want_value = True
    for token in _tokens(text):
        if token[0].isdigit() or token[0] == ".":
            if not want_value:
                raise ValueError(f"no sign between two numbers, at {token}")
            values.append(Fraction(token.replace(",", "")))
            numbers.append(values[-1])
            want_value = False
        elif token == "(":
            if not want_value:
                raise ValueError("no sign before a parenthesis")
            waiting.append(token)
        elif token == ")":
            if want_value:
                raise ValueError("a parenthesis closes where a number should stand")
            while waiting and waiting[-1] != "(":
                _apply(waiting.pop(), values)
            if not waiting:
                raise ValueError("a parenthesis closes that was never opened")
            waiting.pop()
        elif want_value:
            if token not in "+-":
                raise ValueError(f"no number before {token}")
            waiting.append("negative" if token == "-" else "positive")
        elif token in allowed:
            while waiting and waiting[-1] != "(" and _first(waiting[-1], token):
                _apply(waiting.pop(), values)
            waiting.append(token)
            want_value = True
        else:
            raise ValueError(f"{token} is not allowed")
    if want_value:
        raise ValueError("the expression ends where a number should stand" if numbers else "there is no expression")
    while waiting:
        if waiting[-1] == "(":
            raise ValueError("a parenthesis is never closed")
        _apply(waiting.pop(), values)
    return Worked(values[0], numbers)


def _tokens(text: str) -> list[str]:
    text = text.translate(_USUAL)
    for written, meant in _LATEX.items():
        text = text.replace(written, meant)
    text = text.strip()
    if len(text) > _LONGEST:
        raise ValueError(f"over {_LONGEST} characters")
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise ValueError(f"cannot read {text[at : at + 20].strip()!r}")
        tokens.append("**" if match[2] == "^" else match[1] or match[2])
        at = match.end()
    return tokens


def _first(waiting: str, new: str) -> bool:
    """Is the waiting operator worked out before the new one? Powers are read from the right."""
    one, other = _OPERATORS[waiting].rank, _OPERATORS[new].rank
    return one > other or (one == other and new != "**")


def _apply(name: str, values: list[Fraction]) -> None:
    right = values.pop()
    left = right if name in ("negative", "positive") else values.pop()
    try:
        value = _OPERATORS[name].apply(left, right)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS:
        raise ValueError("the number is too large")
    values.append(value)


def written(value: Fraction) -> str:
    """A fraction as people write it: whole where it is, else a decimal of at most 12 digits."""
    if value.denominator == 1:
        return str(value.numerator)
    context = Context(prec=12)
    return f"{context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(context):f}"
