"""Expressions are worked out as Python would, without ever being run."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from groundup.rewards.arithmetic import BASIC, evaluate, written


def test_it_works_out_what_python_does() -> None:
    """Random expressions, whose numbers are written as fractions for Python to be as exact."""
    rng = random.Random(0)
    compared = 0
    for _ in range(2000):
        pieces: list[str] = []
        for _ in range(rng.randint(1, 6)):
            sign = rng.choice(["", "", "", "-", "+"])
            signs = ["+", "-", "*", "/", "//", "%"] + ["**"] * ("**" not in pieces)  # one power: two never end
            pieces += [sign + str(rng.randint(0, 9)), rng.choice(signs)]
        text = "".join(pieces[:-1])
        if rng.random() < 0.5 and len(pieces) > 4:
            text = f"({pieces[0]}{pieces[1]}{pieces[2]}){''.join(pieces[3:-1])}"
        exact = "".join(f"Fraction({c})" if c.isdigit() else c for c in text)
        try:
            expected = eval(exact, {"Fraction": Fraction})  # our own text
        except ZeroDivisionError:
            with pytest.raises(ValueError, match="zero"):
                evaluate(text)
            continue
        if isinstance(expected, (int, Fraction)) and abs(expected) < 10**300:
            try:
                assert evaluate(text).value == expected, text
            except ValueError as refused:
                assert "power" in str(refused) or "large" in str(refused), text
            else:
                compared += 1
    assert compared > 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,234 + .5", Fraction(2469, 2)), ("２×３÷４", Fraction(3, 2)), (r"3 \times \left(4\right)", 12), ("-2^2", -4),
     ("2**-1", Fraction(1, 2)), ("--3", 3), ("7 // 2 % 2", 1), ("(((1)))", 1), ("1 / 3 * 3", 1)],
)  # fmt: skip
def test_ways_of_writing(text: str, value: Fraction) -> None:
    assert evaluate(text).value == value


@pytest.mark.parametrize(
    "text",
    ["", "()", "1 +", "* 2", "1 2", "2(3)", "(1", "1)", "1 / 0", "0 ** -1", "2 ** 0.5", "9 ** 9 ** 9", "1 = 1", "x",
     "__import__('os')", "1_000", "1" * 2000, "(" * 900, "-" * 900, "1 if 1 else 2", "[1][0]", "1;2", "\\frac{1}{2}"],
)  # fmt: skip
def test_what_is_no_expression_is_refused_in_words(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"\w"):
        evaluate(text)
    assert time.perf_counter() - started < 1


def test_only_some_operators() -> None:
    assert evaluate("-1 + 2", BASIC).numbers == [1, 2]
    with pytest.raises(ValueError, match="not allowed"):
        evaluate("2 ** 2", BASIC)


def test_written() -> None:
    shown = {Fraction(6, 2): "3", Fraction(1, 4): "0.25", Fraction(1, 3): "0.333333333333", Fraction(-5, 2): "-2.5"}
    assert {value: written(value) for value in shown} == shown
    assert written(Fraction(10) ** 400) == "1" + "0" * 400
