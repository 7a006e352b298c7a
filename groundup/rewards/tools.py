"""What can a policy call? A calculator, a table, a search over local files, or a function of your own.

A tool never fails a run: whatever is wrong with a call comes back as text, which the policy can read.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from groundup.config import closest
from groundup.config.rl import RewardSpec
from groundup.data.messages import RowError
from groundup.data.records import iter_records
from groundup.errors import UserError
from groundup.rewards.arithmetic import evaluate, written
from groundup.rewards.build import open_worker
from groundup.rewards.search import Index
from groundup.rewards.worker import CallError

MAX_CHARACTERS = 2000  # of what a tool may say
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}


@dataclass(frozen=True)
class Tool:
    """run takes the arguments by name. parameters: name -> type of JSON schema; those in `optional` may be left out."""

    name: str
    description: str
    parameters: Mapping[str, str]
    run: Callable[..., str]
    optional: frozenset[str] = frozenset()
    close: Callable[[], None] = field(default=lambda: None)

    @property
    def schema(self) -> dict[str, Any]:
        """As OpenAI writes it, for the chat template."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        required = [name for name in self.parameters if name not in self.optional]
        parameters = {"type": "object", "properties": properties, "required": required}
        about = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": about}

    def call(self, arguments: Mapping[str, Any]) -> str:
        """What it answers; "error: .." for arguments that it cannot use."""
        missing = [name for name in self.parameters if name not in arguments and name not in self.optional]
        unknown = [name for name in arguments if name not in self.parameters]
        if missing or unknown:
            names = ", ".join(self.parameters) or "nothing"
            return f"error: {self.name} takes {names}, not {', '.join(unknown) or 'less'}"
        given = {name: self._fit(name, value) for name, value in arguments.items()}
        try:
            said = self.run(**given)
        except CallError as error:
            said = f"error: {error}"
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            said = f"error: {error}"
        return said if len(said) <= MAX_CHARACTERS else said[: MAX_CHARACTERS - 2] + ".."

    def _fit(self, name: str, value: Any) -> Any:
        """A number where text is wanted is its spelling."""
        wants_text = self.parameters[name] == "string"
        return json.dumps(value, ensure_ascii=False) if wants_text and not isinstance(value, str) else value


def calculator() -> Tool:
    """A sum, written with + - * / // % ** and parentheses."""
    return Tool("calculator", "Works out a sum.", {"expression": "string"},
                lambda expression: written(evaluate(expression).value))  # fmt: skip


def lookup(path: str, key: str = "key", value: str = "value", description: str = "Looks a word up.") -> Tool:
    """A table: a JSON object, or rows with the columns `key` and `value`. Case and white space do not count."""
    table = _table(Path(path), key, value)

    def run(key: str) -> str:
        found = table.get(_folded(key))
        if found is not None:
            return found
        near = difflib.get_close_matches(_folded(key), table, 3)
        return f"nothing is known of {key}" + (f"; there is {', '.join(near)}" if near else "")

    return Tool("lookup", description, {"key": "string"}, run)


def search(path: str, top: int = 3, max_characters: int = 400, description: str = "Searches the documents.") -> Tool:
    """The best paragraphs of the text files (.txt, .md, .rst) in a folder, or of one file."""
    index = Index(Path(path), max_characters)

    def run(query: str) -> str:
        return "\n\n".join(index.best(query, top)) or "nothing was found"

    return Tool("search", description, {"query": "string"}, run)


GIVEN: dict[str, Callable[..., Tool]] = {"calculator": calculator, "lookup": lookup, "search": search}


def build_tools(
    specs: Iterable[str | Mapping[str, Any]], folder: str | Path | None = None, *, seconds: float = 10.0
) -> list[Tool]:
    """Tools by name, as {"name", "args"}, or `FILE.py:function`, whose docstring and annotations describe it.

    seconds: that a call of a function may take. UserError: an unknown name, wrong arguments, a file that is no use.
    """
    tools = [_build(item, Path(folder or "."), seconds) for item in specs]
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise UserError("tools", f"two tools have one name ({', '.join(names)})", "give each once")
    return tools


def _build(item: str | Mapping[str, Any], folder: Path, seconds: float) -> Tool:
    try:
        spec = RewardSpec.model_validate({"name": item} if isinstance(item, str) else item)
    except ValidationError as error:
        raise UserError("tools", str(error.errors()[0]["msg"]), f"mend {item}") from None
    if spec.name in GIVEN:
        try:
            return GIVEN[spec.name](**spec.args)
        except TypeError as error:
            raise UserError(f"tool {spec.name}", f"cannot take {spec.args} ({error})", "see docs/rewards.md") from None
    if ":" not in spec.name:
        fix = f"{closest(spec.name, list(GIVEN))} (or write FILE.py:function)"
        raise UserError(f"tool {spec.name}", "is unknown", fix)
    return _of_a_user(spec.name, folder, seconds)


def _of_a_user(spec: str, folder: Path, seconds: float) -> Tool:
    path, _, name = spec.rpartition(":")
    worker = open_worker(path, name, folder, where=spec)
    parameters = [p for p in worker.about["parameters"] if not p[1].startswith("VAR_")]

    def run(**arguments: Any) -> str:
        value = worker(seconds, **arguments)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    types = {name: TYPES.get(spelled, "string") for name, _, _, spelled in parameters}
    optional = frozenset(name for name, _, default, _ in parameters if default)
    description = worker.about["doc"].partition("\n\n")[0].replace("\n", " ")
    return Tool(name, description, types, run, optional, worker.close)


def _table(path: Path, key: str, value: str) -> dict[str, str]:
    if not path.is_file():
        raise UserError(path, "there is no such table", "give a JSON object, or rows with a key and a value")
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(path, f"is not JSON ({error})", "mend it") from None
        if isinstance(found, dict):
            return {_folded(name): _spelled(one) for name, one in found.items()}
    table = {}
    for record in iter_records(path):
        if isinstance(record.error, RowError):
            raise UserError(f"{path}:{record.place}", record.error.why, record.error.fix)
        row = record.value or {}
        if key not in row or value not in row:
            raise UserError(f"{path}:{record.place}", f"has no {key} or no {value}", "name the columns: key, value")
        table[_folded(str(row[key]))] = _spelled(row[value])
    return table


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
