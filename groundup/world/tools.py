"""Two tools of the world, a calculator and a calendar of its towns, and episodes that need them."""

from __future__ import annotations

from random import Random
from typing import Any

from groundup.world.rows import ToolEpisode, assistant, user
from groundup.world.split import held_out as is_held_out
from groundup.world.split import random_for
from groundup.world.words import DAYS, TOWNS, Word, words


def _tool(name: str, description: str, *parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    _tool("calculator", "Works out a sum.", "expression"),
    _tool("calendar", "What happens in a town on a day.", "town", "day"),
]
EVENTS = words("market/集市 concert/音乐会 race/赛跑 play/话剧 fair/庙会 match/比赛 parade/游行 film/电影")
ASK_EVENT = {"en": "What happens in {t} on {d}?", "zh": "{t}{d}有什么活动？"}
ASK_SUM = {"en": "What is {e}? Use the calculator.", "zh": "用计算器算一算{e}等于多少。"}
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def calculator(expression: str) -> str:
    """The value of `a+b`, `a-b` or `a*b`, for whole numbers. Raises ValueError on anything else."""
    for sign, operation in OPERATIONS.items():
        left, found, right = expression.replace(" ", "").partition(sign)
        if found:
            return str(operation(int(left), int(right)))
    raise ValueError(f"{expression!r} is not a sum, a difference or a product of two whole numbers")


def event(seed: int, town: Word, day: Word) -> Word:
    """What happens there on that day of the week."""
    return random_for(seed, "event", town.en, day.en).choice(EVENTS)


def calendar(seed: int, town: str, day: str) -> str:
    """The event by the names of the town and the day, in the language they are in. Raises KeyError on unknown ones."""
    for language in ("en", "zh"):
        towns = {word.text(language): word for word in TOWNS}
        days = {word.text(language): word for word in DAYS}
        if town in towns and day in days:
            return event(seed, towns[town], days[day]).text(language)
    raise KeyError(f"no town {town!r} with a day {day!r}")


def call(seed: int, name: str, arguments: dict[str, str]) -> str:
    """The result of a tool call, as text."""
    return (
        calculator(arguments["expression"])
        if name == "calculator"
        else calendar(seed, arguments["town"], arguments["day"])
    )


def episode(rng: Random, seed: int, language: str, held_out: bool) -> ToolEpisode:
    """A question, the tool call, its result and the answer, about a combination on the given side of the split."""
    key: tuple[object, object]
    while True:
        if rng.random() < 0.5:
            left, sign, right = rng.randint(100, 999), rng.choice(list(OPERATIONS)), rng.randint(10, 99)
            key, name, arguments = (left, right), "calculator", {"expression": f"{left}{sign}{right}"}
            question = ASK_SUM[language].format(e=arguments["expression"])
        else:
            town, day = rng.choice(TOWNS), rng.choice(DAYS)
            key, name, arguments = (
                (town.en, day.en),
                "calendar",
                {"town": town.text(language), "day": day.text(language)},
            )
            question = ASK_EVENT[language].format(t=arguments["town"], d=arguments["day"])
        if is_held_out(seed, name, *key) == held_out:
            break
    result = call(seed, name, arguments)
    messages = [
        user(question),
        assistant("", tool_calls=[{"name": name, "arguments": arguments}]),
        {"role": "tool", "content": result},
        assistant(result),
    ]
    return ToolEpisode(messages, TOOLS, result)
