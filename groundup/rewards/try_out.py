"""What would this reward say of answers that are there already? To try one before a training run depends on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from groundup.data.messages import RowError, conversation, turns
from groundup.data.records import iter_records
from groundup.data.rows import Message, message
from groundup.errors import UserError
from groundup.rewards.build import build_rewards

ANSWERS = ("completion", "response", "output")
ASKED = ("prompt", "question", "instruction")
SHOWN = 60  # characters of an answer


def try_reward(name: str, file: str | Path, args: Mapping[str, Any] | None = None, limit: int = 100) -> dict[str, Any]:
    """The reward of each answer of a file, best first, and their mean.

    file: rows with an answer (completion, response, output) to a prompt, or conversations, whose last turn it is; the
    samples.jsonl of a run, too. Their other keys are the columns. UserError: as in training, or rows without an answer.
    """
    prompts, completions, rows = [], [], []
    for record in islice(iter_records(Path(file)), limit):
        try:
            if record.error is not None:
                raise record.error
            asked, answer, rest = _row(dict(record.value or {}))
        except RowError as error:
            raise UserError(f"{file}:{record.place}", error.why, error.fix) from None
        prompts.append(asked)
        completions.append(answer)
        rows.append(rest)
    if not rows:
        raise UserError(file, "holds no rows", "give a file with answers")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    rewards = build_rewards([{"name": name, "args": dict(args or {})}], Path(file).parent)
    try:
        rewards.check(columns)
        ((_, values),) = rewards(prompts, completions, columns)[1].items()
    finally:
        rewards.close()
    judged = [value for value in values if not math.isnan(value)]
    found = sorted(zip(values, completions, strict=True), key=lambda one: -math.inf if math.isnan(one[0]) else one[0])
    return {
        "reward": name, "answers": len(values), "not_judged": len(values) - len(judged),
        "mean": sum(judged) / len(judged) if judged else None, "different": len(set(judged)),
        "rows": [{"reward": None if math.isnan(v) else v, "completion": text} for v, text in reversed(found)],
    }  # fmt: skip


def lines(report: Mapping[str, Any], shown: int = 20) -> list[str]:
    """The report for people: the best and the worst answers, a line each."""
    rows = [f"{_number(row['reward']):>8}  {_short(row['completion'])}" for row in report["rows"]]
    if len(rows) > shown:
        half = shown // 2
        rows = [*rows[:half], f"{'..':>8}  {len(rows) - 2 * half} more", *rows[-half:]]
    text = f"{report['reward']}: mean {_number(report['mean'])} of {report['answers']} answers, "
    text += f"{report['different']} different values, {report['not_judged']} not judged"
    return [*rows, text]


def _row(row: dict[str, Any]) -> tuple[list[Message], str, dict[str, Any]]:
    """(the prompt, the answer, the columns)."""
    key = next((name for name in ANSWERS if isinstance(row.get(name), str)), None)
    if key is not None:
        asked = next((name for name in ASKED if row.get(name)), None)
        answer = row.pop(key)
        return turns(row.pop(asked), asked, "user") if asked else [message("user", "")], answer, row
    chat = next((name for name in ("messages", "conversations") if row.get(name)), None)
    if chat is None:
        raise RowError(f"no answer among {', '.join(row)}", f"give {', '.join(ANSWERS)} or a conversation")
    messages, _ = conversation(row.pop(chat), chat)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError("the conversation does not end with an answer", "remove the row")
    *before, last = messages
    thought = last.get("reasoning_content")
    return before, (f"<think>\n{thought}\n</think>\n\n" if thought else "") + last["content"], row


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} .. {text[-SHOWN // 2 :]}"
