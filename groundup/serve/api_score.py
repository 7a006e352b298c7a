"""POST /score: what is this answer worth? Conversations in, a reward model's number for each out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from groundup.data.steps import render_steps, steps_of
from groundup.errors import UserError
from groundup.infer.worker import Draining, Limits, QueueFull, RequestTimeout
from groundup.serve.api_context import context
from groundup.serve.api_errors import bad, from_user_error, json_response
from groundup.serve.api_prompt import message_of
from groundup.serve.api_replies import ERRORS, Scores
from groundup.serve.api_schema import Message, ScoreRequest

if TYPE_CHECKING:
    from groundup.infer.scoring import Scorer

T = TypeVar("T")
router = APIRouter()
MOST = 2048  # conversations of one request


class ScoreWorker:
    """A reward model in a thread of its own: requests one after another, their conversations together."""

    def __init__(self, scorer: Scorer, limits: Limits | None = None) -> None:
        self.scorer, self.limits = scorer, limits or Limits()
        self.in_flight = 0
        self._closed, self._seconds = False, 1.0
        self._thread = ThreadPoolExecutor(1, "groundup-scorer")

    @property
    def healthy(self) -> bool:
        return not self._closed

    def start(self) -> None:
        """The thread starts with the first request."""

    def stop(self) -> None:
        self._closed = True
        self._thread.shutdown(cancel_futures=True)

    async def drain(self, grace: float) -> None:
        """Take no more requests, and wait for those at hand for up to `grace` seconds."""
        self._closed = True
        end = time.monotonic() + grace
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result. Raises QueueFull, Draining or RequestTimeout where it is not to be had."""
        if self._closed:
            raise Draining("the server is shutting down")
        if self.in_flight > self.limits.max_waiting:
            raise QueueFull(f"{self.in_flight} requests are being scored or wait", max(1, math.ceil(self._seconds)))
        began, limit = time.monotonic(), self.limits.request_timeout
        self.in_flight += 1
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(self._thread, job), limit)
        except TimeoutError:
            raise RequestTimeout(f"not finished within {limit:g} seconds") from None
        finally:
            self.in_flight -= 1
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)


@dataclass(frozen=True)
class ServedScorer:
    """A reward model behind a name."""

    name: str
    worker: ScoreWorker
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def scorer(self) -> Scorer:
        return self.worker.scorer

    @property
    def context(self) -> int:
        return self.scorer.context


def load_scorer(name: str, path: str | Path, device: str, limits: Limits) -> ServedScorer:
    """The reward model of a folder. UserError: it is none."""
    from groundup.infer.scoring import Scorer

    return ServedScorer(name, ScoreWorker(Scorer(path, device=device), limits))


@router.post("/score", responses={200: {"model": Scores}, **ERRORS})
async def score(request: Request, body: ScoreRequest) -> Response:
    """A number for each conversation's last answer; higher is better. Several conversations are a list of lists."""
    served = context(request).models.find_scorer(body.model)
    scorer = served.scorer
    one = isinstance(body.messages[0], Message)
    conversations: Sequence[Any] = [body.messages] if one else body.messages
    if len(conversations) > MOST:
        raise bad("messages", f"messages holds {len(conversations)} conversations; at most {MOST} are taken")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []] or None
    documents, places = await run_in_threadpool(_rendered, scorer, conversations, tools, one)
    found = await served.worker.run(lambda: scorer.score_ids(documents, places))
    tokens = sum(map(len, documents))
    data = [
        {"object": "score", "index": i, "score": min(scores)} | ({"step_scores": scores} if scorer.stepwise else {})
        for i, scores in enumerate(found)
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    label = scorer.model.labels[0]
    return json_response({"object": "list", "data": data, "model": served.name, "label": label, "usage": used})


def _rendered(
    scorer: Scorer, conversations: Sequence[Sequence[Message]], tools: list[dict[str, Any]] | None, one: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """(ids, where scores are read) of each conversation. Raises ApiError that names it."""
    documents, places = [], []
    for number, conversation in enumerate(conversations):
        where = "messages" if one else f"messages[{number}]"
        said = [message_of(message, f"{where}[{i}]") for i, message in enumerate(conversation)]
        if said[-1]["role"] != "assistant":
            raise bad(where, f"{where} must end with the answer that is judged, of role assistant")
        try:
            if scorer.stepwise:
                answer = {"content": "", **said[-1]}
                ids, ends = render_steps(scorer.tokenizer, said[:-1], steps_of(answer) or [""], tools)
            else:
                ids = scorer.tokenizer.render(said, tools).ids
                ends = [len(ids) - 1]
        except UserError as error:
            raise from_user_error(error, where, scorer.tokenizer.where) from error
        except RecursionError:
            raise bad(where, f"{where} or tools are nested too deeply") from None
        if len(ids) > scorer.context:
            why = f"{len(ids)} tokens do not fit in the reward model's context of {scorer.context}"
            raise bad(where, f"{where}: {why}", "context_length_exceeded")
        documents.append(ids)
        places.append(ends)
    return documents, places
