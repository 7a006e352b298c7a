"""What does one reward say, and can it be used? Every fault is told with the name of the function."""

from __future__ import annotations

import logging
import math
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from groundup.errors import UserError
from groundup.rewards.said import Prompts
from groundup.rewards.signature import Signature
from groundup.rewards.worker import CallError, plain

log = logging.getLogger(__name__)
WATCHED = 64  # answers after which a reward that was the same for all of them is told of
FIXES = {
    "raised": "mend the function",
    "hung": "make it faster, or allow it more (reward_seconds)",
    "died": "see what it wrote last; it may have run out of memory",
    "missing": "write FILE.py:function",
}


@dataclass
class Part:
    """One reward. where: for messages. args: its settings. needs: sets of columns, one of which it cannot do without.
    unjudged: answers that it gave no number, of those `seen`."""

    name: str
    where: str
    weight: float
    args: Mapping[str, Any]
    call: Callable[..., Any]
    signature: Signature
    needs: tuple[str, ...] = ()
    close: Callable[[], None] = field(default=lambda: None)
    unjudged: int = 0
    seen: int = 0
    low: float = math.inf
    high: float = -math.inf

    def __call__(self, prompts: Prompts, completions: list[str], columns: Mapping[str, Any]) -> list[float]:
        """A number for each completion, nan where it is not judged. UserError for whatever goes wrong."""
        self.signature.check(columns, self.args, self.where)
        by_place, by_name = self.signature.choose(prompts, completions, columns, self.args)
        try:
            found = self.call(*by_place, **by_name)
        except UserError:
            raise
        except CallError as error:
            raise fault(self.where, error) from None
        except Exception as error:
            why, detail = f"raised {type(error).__name__}: {error}", traceback.format_exc()
            raise UserError(self.where, why, FIXES["raised"], detail) from error
        values = self._numbers(found, completions)
        self._watch(values)
        return values

    def _numbers(self, found: Any, completions: list[str]) -> list[float]:
        values = plain(found)
        if not isinstance(values, list):
            raise UserError(self.where, f"returned {_short(found)}", "return a list of numbers, one a completion")
        if len(values) != len(completions):
            why = f"returned {len(values)} values for {len(completions)} completions"
            raise UserError(self.where, why, "return one for each, None where it is not judged")
        for value, text in zip(values, completions, strict=True):
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                fix = "return a finite number, or None where an answer is not judged"
                raise UserError(self.where, f"returned {_short(value)} for an answer", fix, text[:2000])
        return [math.nan if value is None else float(value) for value in values]

    def _watch(self, values: list[float]) -> None:
        """Say once what would otherwise look like a model that does not learn."""
        before, judged = self.seen, [value for value in values if not math.isnan(value)]
        self.seen, self.unjudged = self.seen + len(values), self.unjudged + len(values) - len(judged)
        self.low, self.high = min([self.low, *judged]), max([self.high, *judged])
        if not (self.weight and before < WATCHED <= self.seen):
            return
        if self.low > self.high:
            log.warning("reward %s judged none of the first %d answers", self.name, self.seen)
        elif self.low == self.high:
            log.warning(
                "reward %s is %g for all of the first %d answers: nothing is learnt from it so far",
                self.name, self.low, self.seen,
            )  # fmt: skip


def fault(where: str, error: CallError) -> UserError:
    return UserError(where, str(error), FIXES[error.kind], error.detail)


def in_thread(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """The function with a time limit. A thread cannot be ended: it is left behind, and CallError raised."""

    def call(*args: Any, **kwargs: Any) -> Any:
        box: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put((True, function(*args, **kwargs)))
            except BaseException as error:
                box.put((False, error))

        threading.Thread(target=work, daemon=True).start()
        try:
            good, value = box.get(timeout=seconds)
        except queue.Empty:
            raise CallError("hung", f"gave no answer within {seconds:g} seconds") from None
        if not good:
            raise value
        return value

    return call


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
