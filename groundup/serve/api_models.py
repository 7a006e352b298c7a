"""What is served, under which names, and within what limits?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError
from groundup.infer.params import SamplingParams
from groundup.serve.api_errors import ApiError

if TYPE_CHECKING:
    from groundup.infer.worker import Worker
    from groundup.serve.api_score import ServedScorer
    from groundup.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A model behind a name. defaults: the folder's own habits, for what a request does not say.

    adapters: names under which the same weights answer with an adapter.
    """

    name: str
    worker: Worker
    tokenizer: Tokenizer
    context: int
    defaults: SamplingParams = field(default_factory=SamplingParams)
    adapters: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class ServerSettings:
    """api_key: what clients must send as a bearer token (None: nothing is asked).

    max_tokens_limit: most new tokens that one answer may ask for (None: the context alone bounds it).
    max_body_bytes: most bytes of a request. max_n: most answers to one prompt. cors_origins: web pages, by origin, that
    may call from a browser ("*": all). drain_seconds: how long running requests may go on after SIGTERM.
    """

    api_key: str | None = None
    max_tokens_limit: int | None = None
    max_body_bytes: int = 8 * 2**20
    max_n: int = 128
    cors_origins: tuple[str, ...] = ()
    drain_seconds: float = 30.0


class Models:
    """All that is served, by name; the first is the default, of models that write and of those that score. Raises
    UserError where two have one name."""

    def __init__(self, served: Sequence[Served], scorers: Sequence[ServedScorer] = ()) -> None:
        self.served, self.scorers = list(served), {one.name: one for one in scorers}
        self._by_name: dict[str, tuple[Served, str | None]] = {}
        for one in served:
            for name, adapter in [(one.name, None), *((name, name) for name in one.adapters)]:
                if name in self._by_name:
                    raise UserError(name, "two models have this name", "give one of them another")
                self._by_name[name] = (one, adapter)
        names = [*self._by_name, *(one.name for one in scorers)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(twice, "two models have this name", "give one of them another")

    def find(self, name: str | None) -> tuple[Served, str | None]:
        """The model of a name and its adapter; the default where no name is given. Raises ApiError 404."""
        if name in self.scorers or not self.served:
            text = "This server has" if name is None else f"The model `{name}` is"
            text += " a reward model: it scores answers (POST /score) and writes none"
            raise ApiError(404, text, param="model", code="model_not_found")
        if name is None:
            return self.served[0], None
        found = self._by_name.get(name)
        if found is None:
            known = ", ".join(self._by_name)
            text = f"The model `{name[:200]}` does not exist; there are: {known}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return found

    def find_scorer(self, name: str | None) -> ServedScorer:
        """The reward model of a name, the first where none is given. Raises ApiError 404."""
        if not self.scorers:
            text = "This server has no reward model; start it with one: groundup serve DIR --scorer NAME=PATH"
            raise ApiError(404, text, param="model", code="model_not_found")
        if name is None:
            return next(iter(self.scorers.values()))
        if name not in self.scorers:
            text = f"There is no reward model `{name[:200]}`; there are: {', '.join(self.scorers)}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return self.scorers[name]

    def cards(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        everyone: list[tuple[str, Any, str | None]] = [(name, *found) for name, found in self._by_name.items()]
        everyone += [(name, scorer, None) for name, scorer in self.scorers.items()]
        return [
            {
                "id": name,
                "object": "model",
                "created": one.created,
                "owned_by": "groundup",
                "root": one.name,
                "parent": one.name if adapter else None,
                "max_model_len": one.context,
            }
            for name, one, adapter in everyone
        ]
