"""POST /v1/chat/completions: messages in, what the assistant says out, whole or piece by piece."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from groundup.infer.worker import Handle
from groundup.serve.api_context import FINGERPRINT, context, usage
from groundup.serve.api_logprobs import chat_logprobs, shown
from groundup.serve.api_message import Speaker
from groundup.serve.api_models import Served
from groundup.serve.api_params import chat_params, enable_thinking, offered_tools, tool_dicts
from groundup.serve.api_prompt import Prompt, chat_prompt, check_context
from groundup.serve.api_replies import ERRORS, STREAM, ChatCompletion
from groundup.serve.api_schema import ChatRequest
from groundup.serve.api_stream import respond

if TYPE_CHECKING:
    from groundup.infer.sequence import Delta

router = APIRouter()


@router.post("/v1/chat/completions", responses={200: {"model": ChatCompletion} | STREAM, **ERRORS})
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a chat. With stream, as server-sent events of chat.completion.chunk objects."""
    api = context(request)
    served, adapter = api.models.find(body.model)
    clock = api.clock(served)
    served.worker.check_room()
    tools = tool_dicts(body) if offered_tools(body) else None
    prompt = await run_in_threadpool(chat_prompt, served, body.messages, tools, enable_thinking(body))
    check_context(served, [prompt], "messages")
    params = chat_params(body, served, api.settings, prompt)
    handle = await api.submit(served, [prompt], params, adapter, body.cache_salt, not body.stream)
    view = ChatView(body, adapter or served.name, served, prompt, handle)
    return await respond(request, handle, view, clock, bool(body.stream), view.include_usage)


@dataclass
class _Choice:
    speaker: Speaker
    tokens: int = 0
    finish_reason: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    unsent: list[dict[str, Any]] = field(default_factory=list)  # logprobs of tokens whose text is still held back


class ChatView:
    """How the answers to one chat are written."""

    def __init__(self, body: ChatRequest, model: str, served: Served, prompt: Prompt, handle: Handle) -> None:
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._logprobs, self._tokenizer, self._handle = bool(body.logprobs), served.tokenizer, handle
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._choices = [_Choice(Speaker(prompt.thinking, offered_tools(body))) for _ in range(body.n or 1)]

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self._choices))]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        choice = self._choices[delta.index]
        choice.tokens += len(delta.ids)
        if self._logprobs:
            choice.unsent += chat_logprobs(self._tokenizer, shown(delta))
        said = choice.speaker.feed(delta.text)
        if delta.finish_reason:
            said += choice.speaker.finish()
            choice.finish_reason = choice.speaker.finish_reason(delta.finish_reason)
        chunks = [self._chunk(delta.index, one) for one in said]
        if delta.finish_reason:
            chunks.append(self._chunk(delta.index, {}, choice.finish_reason))
        if chunks and choice.unsent:
            chunks[0]["choices"][0]["logprobs"] = {"content": choice.unsent, "refusal": None}
            choice.logprobs += choice.unsent
            choice.unsent = []
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [], self._usage())

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": choice.speaker.message(),
                "logprobs": {"content": choice.logprobs, "refusal": None} if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return self._object("chat.completion", choices, self._usage())

    def _chunk(self, index: int, said: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": said, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._object("chat.completion.chunk", [choice])
        return chunk | {"usage": None} if self.include_usage else chunk

    def _object(self, kind: str, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **({"usage": used} if used else {})}

    def _usage(self) -> dict[str, Any]:
        return usage(self._handle.requests, sum(choice.tokens for choice in self._choices))
