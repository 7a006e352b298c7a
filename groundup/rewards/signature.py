"""Which of all there is to know does a function ask for? Columns go to it by name, as far as it names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groundup.config import closest
from groundup.errors import UserError
from groundup.rewards.said import Prompts

_OWN = ("prompts", "completions")


@dataclass(frozen=True)
class Signature:
    """names: of all its parameters but prompts and completions. required: those without a default. settings: those
    behind a `*` with a default, which a recipe sets and a column never does. open: it takes any column (**columns).
    by_name: which of prompts and completions are given by name; none: both, by place.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    settings: tuple[str, ...]
    open: bool
    by_name: tuple[str, ...]

    @classmethod
    def read(cls, parameters: Iterable[Sequence[Any]]) -> Signature:
        """parameters: [name, kind, whether it has a default, ..] as worker.describe gives them."""
        named, rest = [], set()
        for name, kind, default, *_ in parameters:
            if kind.startswith("VAR_"):
                rest.add(kind)
            else:
                named.append((name, kind, default))
        open = "VAR_KEYWORD" in rest
        own = tuple(name for name in _OWN if any(name == one for one, *_ in named))
        if open and (own or (not named and "VAR_POSITIONAL" not in rest)):
            own = _OWN
        named = [one for one in named if one[0] not in own] if own else named[2:]
        return cls(
            tuple(name for name, *_ in named),
            tuple(name for name, _, default in named if not default),
            tuple(name for name, kind, default in named if kind == "KEYWORD_ONLY" and default),
            open,
            own,
        )

    def check(self, columns: Iterable[str], args: Mapping[str, Any], where: str) -> None:
        """UserError for an argument that the function does not have, or for one of its own that nobody gives."""
        self.check_args(args, where)
        missing = [name for name in self.required if name not in {*columns, *args}]
        if missing:
            raise no_column(where, missing[0], columns)

    def check_args(self, args: Mapping[str, Any], where: str) -> None:
        for name in args:
            if name not in self.names:
                fix = closest(name, self.names) if self.names else "it takes none"
                raise UserError(where, f"has no argument {name}", fix)

    def choose(
        self, prompts: Prompts, completions: list[str], columns: Mapping[str, Any], args: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """What the function is called with, by place and by name."""
        own = dict(zip(_OWN, (prompts, completions), strict=True))
        taken = columns if self.open else {name: columns[name] for name in self.names if name in columns}
        kept = {name: value for name, value in taken.items() if name not in (*self.settings, *_OWN)}
        by_name = {name: own[name] for name in self.by_name}
        return [] if self.by_name else list(own.values()), {**kept, **args, **by_name}


def no_column(where: str, wanted: str, columns: Iterable[str]) -> UserError:
    there = ", ".join(sorted(columns)) or "none"
    return UserError(where, f"needs {wanted}, the rows have {there}", "give it as a column of the rows, or in args")
