"""Which rewards does a recipe ask for, and what are answers worth by all of them?

A reward is a function `(prompts, completions, **columns) -> list[float]`: prompts are lists of messages, completions
texts with their thoughts, columns one list for each key of the rows (and completion_ids), each with an entry an
answer. It is one of GIVEN, `FILE.py:function`, or a Python function. None for an answer: it is not judged.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import ValidationError

from groundup.config import closest
from groundup.config.rl import RewardSpec
from groundup.errors import UserError
from groundup.rewards.part import Part, fault, in_thread
from groundup.rewards.said import Prompts
from groundup.rewards.signature import Signature, no_column
from groundup.rewards.worker import CallError, Worker, describe

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

Spec: TypeAlias = "RewardSpec | str | Mapping[str, Any] | Callable[..., Any]"
# name: file and function (or a class, whose objects are called), and the columns that it needs: one of these sets.
GIVEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "exact": ("exact:exact", ("answer",)),
    "number": ("number:number", ("answer",)),
    "countdown": ("countdown:countdown", ("nums target",)),
    "knights_knaves": ("knights:knights_knaves", ("names solution", "solution_text_format")),
    "code": ("code:code", ("tests", "test entry_point", "test_list", "input_output")),
    "format": ("format:tagged", ()),
    "length": ("length:length", ()),
    "overlong": ("length:overlong", ()),
    "repetition": ("repetition:repetition", ()),
    "language": ("language:language", ()),
    "reward_model": ("model:RewardModel", ()),
    "judge": ("judge:Judge", ()),
}
SECONDS = 60.0  # that a call may take


def build_rewards(
    specs: Iterable[Spec], folder: str | Path | None = None, *, seconds: float = SECONDS,
    tokenizer: Tokenizer | None = None, device: object = None,
) -> Rewards:  # fmt: skip
    """What a recipe lists under rewards, ready to be called.

    folder: where FILE.py is looked for, after the current one. seconds: that a function of a user may take for one
    call. tokenizer: counts tokens where the caller brings no completion_ids. device: for reward models. UserError: an
    unknown name, an argument that is wrong, a file that cannot be imported.
    """
    parts: list[Part] = []
    rewards = Rewards(parts, tokenizer)
    try:
        for item in specs:
            part = _part(item, Path(folder or "."), seconds, device)
            same = sum(other.name.partition("#")[0] == part.name for other in parts)
            part.name += f"#{same + 1}" if same else ""
            parts.append(part)
    except UserError:
        rewards.close()
        raise
    if not parts:
        raise UserError("rl.rewards", "is empty", f"name one or more of {', '.join(GIVEN)}, or FILE.py:function")
    return rewards


class Rewards:
    """Several rewards as one. names: of the parts. unjudged: how many answers each of them did not judge so far."""

    def __init__(self, parts: Sequence[Part], tokenizer: Tokenizer | None = None) -> None:
        self.parts, self.tokenizer = parts, tokenizer

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def unjudged(self) -> dict[str, int]:
        return {part.name: part.unjudged for part in self.parts}

    def check(self, columns: Iterable[str]) -> None:
        """UserError where a reward needs a column that no row has; known before anything is sampled."""
        there = {*columns, "completion_ids"}
        for part in self.parts:
            part.signature.check(there, part.args, part.where)
            if part.needs and not any(there >= set(one.split()) for one in part.needs):
                raise no_column(part.where, ", or ".join(one.replace(" ", " and ") for one in part.needs), columns)

    def __call__(
        self, prompts: Prompts, completions: list[str], columns: Mapping[str, list[Any]]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """(the weighted sums, the values of each reward by its name); nan: not judged.

        A reward that judges no answer to a prompt does not concern that prompt. Where it judges only some of them, the
        others have no total: they could not be compared.
        """
        if not completions:
            return [], {part.name: [] for part in self.parts}
        columns = dict(columns)
        if "completion_ids" not in columns and self.tokenizer is not None:
            columns["completion_ids"] = self.tokenizer.encode_batch(completions)
        values = {part.name: part(prompts, completions, columns) for part in self.parts}
        groups: dict[str, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            groups[json.dumps(prompt, sort_keys=True, default=str)].append(index)
        totals = [math.nan] * len(completions)
        for group in groups.values():
            counted = [p for p in self.parts if p.weight and any(not math.isnan(values[p.name][i]) for i in group)]
            for index in group if counted else []:
                totals[index] = sum(part.weight * values[part.name][index] for part in counted)
        return totals, values

    def close(self) -> None:
        """End the processes of users' functions; they also end with ours."""
        for part in self.parts:
            part.close()


def _part(item: Spec, folder: Path, seconds: float, device: object) -> Part:
    if callable(item):
        where = getattr(item, "__name__", type(item).__name__)
        signature = Signature.read(describe(item)["parameters"])
        return Part(where, where, 1.0, {}, in_thread(item, seconds), signature)
    try:
        spec = RewardSpec.model_validate({"name": item} if isinstance(item, str) else item)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError("rl.rewards", f"{'.'.join(map(str, first['loc']))}: {first['msg']}", f"mend {item}") from None
    if spec.name in GIVEN:
        return _given(spec, device)
    if ":" in spec.name:
        return _of_a_user(spec, folder, seconds)
    raise UserError(
        f"reward {spec.name}", "is unknown", f"{closest(spec.name, list(GIVEN))} (or write FILE.py:function)"
    )


def _given(spec: RewardSpec, device: object) -> Part:
    place, needs = GIVEN[spec.name]
    file, _, name = place.partition(":")
    function = getattr(importlib.import_module(f"groundup.rewards.{file}"), name)
    where, args = f"reward {spec.name}", dict(spec.args)
    taken = Signature.read(describe(function)["parameters"])
    if inspect.isclass(function):
        taken = Signature.read([["prompts", "", True], ["completions", "", True], *describe(function)["parameters"]])
    taken.check_args(args, where)
    if "device" in taken.names and device is not None:
        args.setdefault("device", str(device))
    missing = [name for name in taken.required if name not in args]
    if missing:
        raise UserError(where, f"needs the argument {missing[0]}", f"write args: {{{missing[0]}: ...}}")
    try:
        if inspect.isclass(function):
            function, args = function(**args), {}
        else:
            function([], [], **args)  # finds what is wrong with its settings
    except (ValueError, TypeError) as error:
        raise UserError(where, f"cannot take {spec.args} ({error})", "see docs/rewards.md") from None
    signature = Signature.read(describe(function)["parameters"])
    return Part(spec.name, where, spec.weight, args, function, signature, needs)


def _of_a_user(spec: RewardSpec, folder: Path, seconds: float) -> Part:
    path, _, name = spec.name.rpartition(":")
    worker = open_worker(path, name, folder, where=spec.name)
    signature = Signature.read(worker.about["parameters"])
    try:
        signature.check_args(spec.args, spec.name)
    except UserError:
        worker.close()
        raise
    return Part(name, spec.name, spec.weight, spec.args, partial(worker, seconds), signature, close=worker.close)


def open_worker(path: str, name: str, folder: Path, where: str) -> Worker:
    """A process for `name` of a file, which is looked for here and in `folder`. UserError: there is none."""
    places = dict.fromkeys([Path(path).expanduser(), folder / path])
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(where, "there is no such file", f"looked for {' and '.join(map(str, places))}")
    try:
        return Worker(file, name)
    except CallError as error:
        raise fault(where, error) from None
