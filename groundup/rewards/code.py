"""Does the program do what it should? The last block of code of an answer is run against tests, in a sandbox."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial as bound
from typing import Any

from groundup.rewards.said import Column, Prompts, Scores, between, column, said
from groundup.rewards.sandbox import Limits, check_locks, run_program, run_tests

_BLOCK = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = ("", "python", "python3", "py")
_IMPORT = re.compile(r"^(?:import|from) .+$", re.MULTILINE)


@dataclass(frozen=True)
class Tests:
    """What is run after a program: statements that raise where it is wrong, or pairs of input and output."""

    statements: list[str]
    pairs: list[tuple[str, str]]


def code(
    prompts: Prompts, completions: list[str], tests: Column = None, test: Column = None, entry_point: Column = None,
    test_list: Column = None, test_setup_code: Column = None, input_output: Column = None, *, partial: bool = False,
    seconds: float = 5.0, memory_mb: int = 512, disk_mb: int = 0, workers: int | None = None, **columns: Any,
) -> Scores:  # fmt: skip
    """1 where the program passes all its tests, else 0; partial: the share that it passes.

    Columns, any of: tests (statements, or {"input", "output"} for a program that reads and prints); test and
    entry_point (HumanEval); test_list and test_setup_code (MBPP); input_output (APPS). None without any.
    workers: programs run at once; default: one a core. The other settings are those of sandbox.Limits.
    """
    limits = Limits(seconds, memory_mb, disk_mb=disk_mb)
    check_locks(disk_mb > 0)
    count = len(completions)
    names = ("tests", "test", "entry_point", "test_list", "test_setup_code", "input_output")
    values = (tests, test, entry_point, test_list, test_setup_code, input_output)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(column(v, count) for v in values), strict=True)]
    grade = bound(_grade, limits=limits, partial=partial)
    with ThreadPoolExecutor(workers or _cores()) as pool:
        return list(pool.map(grade, prompts, completions, rows))


def _grade(prompt: list[dict[str, Any]], text: str, row: dict[str, Any], limits: Limits, partial: bool) -> float | None:
    tests = find_tests(row)
    if tests is None:
        return None
    program = find_program(text, prompt[-1]["content"] if prompt else "", row["entry_point"])
    marks: list[bool] = []
    if tests.statements:
        marks += run_tests(program, tests.statements, limits).passed
    for given, wanted in tests.pairs:
        if marks and not all(marks) and not partial:
            break
        outcome = run_program(program, given, limits)
        marks.append(outcome.passed[0] and _lines(outcome.output) == _lines(wanted))
    return sum(marks) / len(marks) if partial else float(all(marks))


def find_program(text: str, asked: str, entry_point: str | None) -> str:
    """The last block of code of what is said in the end, or all of it. A function that the prompt begins is completed,
    and a block that defines it anew keeps the prompt's imports."""
    text = said(text)
    inside = between(text, "answer")
    text = text if inside is None else inside
    blocks = [block for name, block in _BLOCK.findall(text) if name.lower() in _PYTHON]
    program = blocks[-1] if blocks else text
    if entry_point and f"def {entry_point}(" in asked:
        whole = f"def {entry_point}(" in program
        program = "\n".join(_IMPORT.findall(asked)) + "\n" + program if whole else asked + program
    return program


def find_tests(row: dict[str, Any]) -> Tests | None:
    """The tests of a row, in whichever columns they are; None where there are none."""
    statements: list[str] = []
    pairs: list[tuple[str, str]] = []
    for one in _list(row["tests"]):
        if isinstance(one, dict):
            pairs.append((_text(one.get("input", "")), _text(one.get("output", ""))))
        else:
            statements.append(str(one))
    if row["test"] and row["entry_point"]:
        statements.append(f"{row['test']}\ncheck({row['entry_point']})")
    before = "\n".join(map(str, _list(row["test_setup_code"])))
    statements += [f"{before}\n{one}" for one in _list(row["test_list"])]
    both = row["input_output"]
    if both:
        both = json.loads(both) if isinstance(both, str) else both
        pairs += [(_text(i), _text(o)) for i, o in zip(both["inputs"], both["outputs"], strict=True)]
    return Tests(statements, pairs) if statements or pairs else None


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _text(value: Any) -> str:
    """Input or output of a program; some files hold it as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _lines(text: str) -> list[str]:
    """What counts of an output: its lines, without white space at their ends or empty ones behind them."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
