"""How does the page reach the model? The `openai` client on a thread of its own, so that any answer can be cut off."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai

from groundup.serve.page_chat import Answer, Fault, Model, Settings


class Wire:
    """One OpenAI-compatible server. Answers are filled on a background event loop; stopping one closes its connection.

    url: the base, e.g. http://127.0.0.1:8000/v1. No retries: the page has a button for that.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="page-client", daemon=True).start()
        wait = openai.Timeout(600, connect=5)
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=wait)

    def models(self) -> list[Model]:
        """What can be asked. Raises Fault."""
        return asyncio.run_coroutine_threadsafe(self._models(), self._loop).result()

    async def _models(self) -> list[Model]:
        try:
            page = await self._client.with_options(timeout=10).models.list()
        except openai.OpenAIError as error:
            raise as_fault(error, self.url) from None
        found = [_model(entry.model_dump()) for entry in page.data]
        if not found:
            raise Fault("no_models", self.url)
        return found

    def ask(self, answer: Answer, messages: list[dict[str, Any]], settings: Settings) -> None:
        """Begin to fill an answer; `answer.stop()` ends it, which aborts the request on the server."""
        task = asyncio.run_coroutine_threadsafe(self._fill(answer, messages, settings.request()), self._loop)
        answer.stop = task.cancel
        task.add_done_callback(lambda ended: answer.end("stopped") if ended.cancelled() else None)

    async def _fill(self, answer: Answer, messages: Any, request: dict[str, Any]) -> None:
        begun = False
        try:
            stream = await self._client.chat.completions.create(
                model=answer.model, messages=messages, stream=True, stream_options={"include_usage": True}, **request
            )
            begun = True
            async with stream:
                async for chunk in stream:
                    answer.take(chunk)
        except openai.OpenAIError as error:
            lost = begun and isinstance(error, openai.APIConnectionError)
            answer.end(fault=Fault("broken") if lost else as_fault(error, self.url))
        except Exception as error:  # a broken stream raises errors of the transport or the JSON reader
            answer.end(fault=Fault("broken", f"{type(error).__name__}: {error}"))
        else:
            answer.end(fault=None if answer.finish_reason else Fault("broken"))


def as_fault(error: openai.OpenAIError, url: str) -> Fault:
    """An error of the client as a kind and what the server said of it."""
    if isinstance(error, openai.APITimeoutError):
        return Fault("timeout", url)
    if isinstance(error, openai.APIConnectionError):
        return Fault("unreachable", url)
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    detail = str(said or getattr(error, "message", "") or error)
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return Fault("key", detail)
    if status == 429:
        return Fault("busy", detail)
    return Fault("refused" if status and status < 500 else "server", detail)


def _model(entry: dict[str, Any]) -> Model:
    return Model(entry["id"], parent=str(entry.get("parent") or ""), sees=_sees(entry))


def _sees(entry: dict[str, Any]) -> bool:
    """Does an entry of /v1/models claim pictures? Servers say it in different places; silence means no."""
    nested = entry.get("architecture")
    places = [entry, nested if isinstance(nested, dict) else {}]
    named = [place.get(key) for place in places for key in ("capabilities", "modalities", "input_modalities")]
    words = [word for value in named for word in _true_words(value)]
    return any(word in ("image", "vision", "multimodal") for word in words)


def _true_words(value: Any) -> list[str]:
    """["text", "image"], or {"vision": true}, as words."""
    if isinstance(value, dict):
        return [str(word) for word, on in value.items() if on]
    return [str(word) for word in value] if isinstance(value, list) else []
