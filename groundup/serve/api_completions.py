"""POST /v1/completions: text or token ids in, how they go on out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from groundup.infer.worker import Handle
from groundup.serve.api_context import FINGERPRINT, context, usage
from groundup.serve.api_logprobs import CompletionLogprobs, shown
from groundup.serve.api_models import Served
from groundup.serve.api_params import completion_params
from groundup.serve.api_prompt import Prompt, check_context, text_prompts
from groundup.serve.api_replies import ERRORS, STREAM, Completion
from groundup.serve.api_schema import CompletionRequest
from groundup.serve.api_stream import respond

if TYPE_CHECKING:
    from groundup.infer.sequence import Delta
    from groundup.infer.sequence import Request as EngineRequest

router = APIRouter()


@router.post("/v1/completions", responses={200: {"model": Completion} | STREAM, **ERRORS})
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Go on with each prompt. With stream, as server-sent events."""
    api = context(request)
    served, adapter = api.models.find(body.model)
    clock = api.clock(served)
    served.worker.check_room()
    prompts = await run_in_threadpool(text_prompts, served, body.prompt)
    check_context(served, prompts, "prompt")
    params = completion_params(body, served, api.settings, min(len(prompt.ids) for prompt in prompts))
    handle = await api.submit(served, prompts, params, adapter, body.cache_salt, not body.stream)
    view = CompletionView(body, adapter or served.name, served, prompts, handle)
    return await respond(request, handle, view, clock, bool(body.stream), view.include_usage)


@dataclass
class _Choice:
    logprobs: CompletionLogprobs
    text: str = ""
    unsent: str = ""
    begun: bool = False
    tokens: int = 0
    logprob: float = 0.0  # of all tokens together
    finish_reason: str | None = None

    @property
    def mean(self) -> float:
        return self.logprob / max(self.tokens, 1)


class CompletionView:
    """How the answers to one request are written: n a prompt, in the order of the prompts."""

    def __init__(
        self, body: CompletionRequest, model: str, served: Served, prompts: Sequence[Prompt], handle: Handle
    ) -> None:
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._echo, self._silent = bool(body.echo), body.max_tokens == 0
        self._logprobs, self._n, self._streams = body.logprobs is not None, body.n or 1, bool(body.stream)
        self._tokenizer, self._prompts, self._handle = served.tokenizer, prompts, handle
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._place = {request.id: place for place, request in enumerate(handle.requests)}
        n = handle.requests[0].params.n
        self._choices = [[_Choice(CompletionLogprobs(self._tokenizer)) for _ in range(n)] for _ in prompts]

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        place = self._place[delta.request.id]
        choice = self._choices[place][delta.index]
        if self._echo and not choice.begun:
            self._echo_prompt(choice, self._prompts[place], delta.request)
        choice.begun = True
        if not self._silent:
            choice.tokens += len(delta.ids)
            choice.unsent += delta.text
            choice.logprob += sum(entry.logprob for entry in delta.logprobs or [])
            if self._logprobs:
                for entry in shown(delta):
                    choice.logprobs.add(entry.id, entry.logprob, entry.top)
        choice.finish_reason = ("length" if self._silent else delta.finish_reason) if delta.finish_reason else None
        if not choice.unsent and not choice.finish_reason:
            return []
        text, choice.unsent = choice.unsent, ""
        choice.text += text
        if not self._streams:  # logprobs stay together for `whole`
            return []
        logprobs = choice.logprobs.take() if self._logprobs else None
        one = self._choice(place * self._n + delta.index, text, logprobs, choice.finish_reason)
        return [self._object([one]) | ({"usage": None} if self.include_usage else {})]

    def usage_chunk(self) -> dict[str, Any]:
        return self._object([]) | {"usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for of_prompt in self._choices:
            best = of_prompt
            if len(of_prompt) > self._n:
                best = sorted(of_prompt, key=lambda choice: choice.mean, reverse=True)[: self._n]
            for choice in best:
                logprobs = choice.logprobs.take() if self._logprobs else None
                choices.append(self._choice(len(choices), choice.text, logprobs, choice.finish_reason))
        return self._object(choices) | {"usage": self._usage()}

    def _echo_prompt(self, choice: _Choice, prompt: Prompt, request: EngineRequest) -> None:
        """The prompt as the client wrote it, with its logprobs; nothing comes before the first token to judge it by."""
        ids = prompt.ids[prompt.hidden :]
        choice.unsent = self._tokenizer.decode(ids)
        if not self._logprobs:
            return
        if not prompt.hidden:
            choice.logprobs.add(ids[0])
        for entry in request.prompt_logprobs[max(prompt.hidden - 1, 0) :]:
            choice.logprobs.add(entry.id, entry.logprob, entry.top)

    def _choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        return usage(self._handle.requests, sum(c.tokens for choices in self._choices for c in choices))
