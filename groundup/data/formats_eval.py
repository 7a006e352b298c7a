"""Parsers of questions with a known answer: exams and benchmarks as published, and puzzles that a program grades."""

from __future__ import annotations

from typing import Any

from groundup.data.formats_chat import string
from groundup.data.messages import RowError
from groundup.data.rows import Choice, Prompt, Row, message

LETTERS = "ABCDEFGHIJ"


def exam(row: dict[str, Any]) -> Row:
    """C-Eval, CMMLU, MMLU: columns Question, A, B, .., Answer in any case. The answer is None in secret test splits."""
    cells = {key.lower(): "" if value is None else str(value) for key, value in row.items()}
    choices = [cells[letter] for letter in LETTERS.lower() if letter in cells]
    while choices and not choices[-1]:
        choices.pop()
    return _choice(cells.get("question"), choices, cells.get("answer"), LETTERS)


def choice(row: dict[str, Any]) -> Row:
    """{"question","choices","answer"}, and ARC's and OpenBookQA's own shapes with "answerKey"."""
    question: Any = row.get("question")
    choices: Any = row.get("choices")
    if isinstance(question, dict):  # OpenBookQA: {"stem", "choices"}
        question, choices = question.get("stem"), question.get("choices")
    question = row.get("question_stem") if question is None else question
    labels: Any = LETTERS
    if isinstance(choices, dict):  # the hub's columns: {"text": [..], "label": [..]}
        choices, labels = choices.get("text"), choices.get("label") or LETTERS
    elif isinstance(choices, list) and choices and all(isinstance(one, dict) for one in choices):
        choices, labels = [one.get("text") for one in choices], [one.get("label") for one in choices]
    if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
        raise RowError("`choices` is not a list of strings", 'write "choices": ["first", "second"]')
    key = row.get("answer") if row.get("answer") is not None else row.get("answerKey")
    context = string(row, "context") if row.get("context") else ""
    return _choice(question, choices, key, labels if isinstance(labels, list) else LETTERS, context)


def _choice(question: Any, choices: list[str], key: Any, labels: Any, context: str = "") -> Choice:
    if not isinstance(question, str) or not question:
        raise RowError("the question is empty", "remove the row")
    if len(choices) < 2:
        raise RowError(f"{len(choices)} choices", "a question needs two at least")
    if key is None or key == "":
        return Choice(question, choices, None, context)
    if isinstance(key, int) and not isinstance(key, bool):
        index = key
    else:
        known = [str(label) for label in labels]
        key = str(key).strip()
        index = known.index(key) if key in known else choices.index(key) if key in choices else -1
    if not 0 <= index < len(choices):
        raise RowError(f"the answer {key!r} is none of the {len(choices)} choices", "give its index, letter or text")
    return Choice(question, choices, index, context)


def xcopa(row: dict[str, Any]) -> Row:
    """COPA / XCOPA: {"premise","choice1","choice2","question": cause or effect,"label"}."""
    choices = [string(row, "choice1"), string(row, "choice2")]
    return _choice(string(row, "question"), choices, row.get("label"), (0, 1), string(row, "premise"))


def labelled(row: dict[str, Any]) -> Row:
    """FewCLUE's classification rows: {"sentence"} or {"sentence1","sentence2"} or {"target","text"}, with a "label"."""
    label = str(row.get("label")).strip()
    if isinstance(row.get("target"), dict):
        who, it = row["target"].get("span1_text"), row["target"].get("span2_text")
        return _choice(f"“{it}”指的是“{who}”吗？", ["不是", "是"], label, ("false", "true"), string(row, "text"))
    if "sentence" in row:
        return _choice(
            "这句话的态度是什么？", ["负面", "正面"], label, ("Negative", "Positive"), string(row, "sentence")
        )
    pair = f"{string(row, 'sentence1')}\n{string(row, 'sentence2')}"
    if label in ("0", "1"):
        return _choice("这两句话的意思相同吗？", ["不同", "相同"], label, ("0", "1"), pair)
    known = ("entailment", "neutral", "contradiction")
    return _choice("由第一句能推出第二句吗？", ["能推出", "无法确定", "相矛盾"], label, known, pair)


def question_answer(row: dict[str, Any]) -> Row:
    """GSM8K and its kin: what follows `####` is the answer; the whole solution stays in extra."""
    solution = row.get("answer")
    solution = str(solution) if isinstance(solution, int | float) else string(row, "answer")
    result = solution.rsplit("####", 1)[-1].strip()
    if not result:
        raise RowError("nothing follows `####` in `answer`", "write the result there")
    return Prompt(_ask(row, "question"), result, {"solution": solution} | _rest(row, "question", "answer"))


def cmath(row: dict[str, Any]) -> Row:
    """CMATH: {"input","golden"}."""
    return Prompt(_ask(row, "input"), string(row, "golden"), _rest(row, "input", "golden"))


def reference(row: dict[str, Any]) -> Row:
    """AlignBench: {"question","reference"}; a judge compares with the reference."""
    return Prompt(_ask(row, "question"), string(row, "reference"), _rest(row, "question", "reference"))


def multi_turn(row: dict[str, Any]) -> Row:
    """MT-Bench: {"turns": [..]}. The first turn is the prompt; all of them, and the references, stay in extra."""
    asked = row.get("turns")
    if not isinstance(asked, list) or not asked or not all(isinstance(turn, str) for turn in asked):
        raise RowError("`turns` is not a list of strings", 'write "turns": ["first question", ..]')
    return Prompt([message("user", asked[0])], row.get("reference"), _rest(row, "reference"))


def program(row: dict[str, Any]) -> Row:
    """HumanEval: {"prompt","canonical_solution","test","entry_point"}; the tests grade."""
    return Prompt(_ask(row, "prompt"), string(row, "canonical_solution"), _rest(row, "prompt", "canonical_solution"))


def countdown(row: dict[str, Any]) -> Row:
    """{"target","nums"}: reach the target with every number used once; an equation in <answer> tags is graded."""
    target, nums = row.get("target"), row.get("nums")
    if not isinstance(target, int) or not isinstance(nums, list) or not all(isinstance(n, int) for n in nums):
        raise RowError(
            "`target` must be an integer and `nums` a list of integers", 'like {"target": 24, "nums": [4, 6]}'
        )
    asked = (
        f"Using the numbers {nums}, create an equation that equals {target}. Use each number exactly once, and only "
        "+, -, *, / and parentheses. Finally return <answer> equation </answer>."
    )
    return Prompt([message("user", asked)], str(target), dict(row))


def knights(row: dict[str, Any]) -> Row:
    """Knights and knaves: {"quiz","names","solution","solution_text_format"}."""
    spoken = row.get("solution_text_format")
    return Prompt(_ask(row, "quiz"), spoken if isinstance(spoken, str) else row.get("solution"), _rest(row, "quiz"))


def _ask(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    asked = string(row, key)
    if not asked.strip():
        raise RowError(f"`{key}` is empty", "remove the row")
    return [message("user", asked)]


def _rest(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}
