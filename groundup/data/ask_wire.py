"""How is a server asked? One POST a prompt, tried again while that may help; nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, TypeAlias

from groundup.data.messages import RowError, tool_calls
from groundup.data.rows import Message, Tools
from groundup.errors import UserError

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two tries: doubled each time
AGAIN = (408, 409, 425, 429)  # and all from 500 on: the server may think otherwise later
HOPELESS = {
    401: "give its key: --api-key, or OPENAI_API_KEY",
    403: "give a key that may do this: --api-key, or OPENAI_API_KEY",
    404: "check --url (it mostly ends in /v1) and --model",
    405: "check --url (it mostly ends in /v1)",
}


@dataclass(frozen=True)
class Answered:
    """An answer worth keeping, as a message of ours."""

    message: Message


@dataclass(frozen=True)
class Rejected:
    """No answer to learn from, and there will be none: asking again makes no sense."""

    why: str


@dataclass(frozen=True)
class Failed:
    """No answer after all tries."""

    where: str
    why: str


@dataclass(frozen=True)
class Fatal:
    """The server takes no request of this kind."""

    where: str
    why: str
    fix: str


Outcome: TypeAlias = "Answered | Rejected | Failed | Fatal"


class Wire:
    """One OpenAI-compatible server. url: its base, e.g. http://127.0.0.1:8000/v1. timeout: seconds for an answer."""

    def __init__(self, url: str, api_key: str | None = None, retries: int = 6, timeout: float = 600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError("--url", f"{url!r} is no web address", "write e.g. http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.api_key, self.retries, self.timeout = api_key, retries, timeout
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Nobody waits for a next try any more."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def ask(self, body: dict[str, Any]) -> Outcome:
        """One prompt, tried again with growing pauses (or as long as the server says) while that may help."""
        why = ""
        for attempt in range(self.retries + 1):
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                return read_answer(self._post(body))
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}: {_said(error)}"
                if error.code in HOPELESS:
                    return Fatal(self.url, why, HOPELESS[error.code])
                if error.code < 500 and error.code not in AGAIN:
                    return Rejected(why)
                wait = _seconds(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, a cut or garbled reply
                why = str(getattr(error, "reason", "") or error) or type(error).__name__
            if attempt < self.retries and self._stopped.wait(wait):
                break
        return Failed(self.url, why)

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "groundup"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            return json.loads(reply.read())


def read_answer(reply: Any) -> Answered | Rejected:
    """What a chat completion says. ValueError: it is none."""
    try:
        choice = reply["choices"][0]
        said, reason = choice["message"], choice.get("finish_reason")
        content, thought = said.get("content") or "", said.get("reasoning_content") or said.get("reasoning") or ""
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"the reply is no chat completion: {str(reply)[:80]}") from None
    if reason == "length":
        return Rejected("cut at max_tokens")
    if reason == "content_filter":
        return Rejected("held back by the server's filter")
    try:
        calls = tool_calls(said.get("tool_calls") or [])
    except RowError as error:
        return Rejected(f"a broken tool call: {error.why}")
    if not (str(content).strip() or calls):
        return Rejected("empty")
    message: Message = {"role": "assistant", "content": str(content)}
    if thought:
        message["reasoning_content"] = str(thought)
    return Answered(message | ({"tool_calls": calls} if calls else {}))


def as_request(messages: list[Message], tools: Tools) -> dict[str, Any]:
    """Messages and tools as OpenAI's API takes them. Earlier thoughts stay here: servers do not take them."""
    out: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for number, one in enumerate(messages):
        sent: dict[str, Any] = {"role": one["role"], "content": one["content"]}
        if one.get("tool_calls"):
            open_calls = [f"call_{number}_{i}" for i in range(len(one["tool_calls"]))]
            sent["tool_calls"] = [
                {"id": name, "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
                for name, call in zip(open_calls, one["tool_calls"], strict=True)
            ]
        if one["role"] == "tool":
            sent["tool_call_id"] = open_calls.pop(0) if open_calls else f"call_{number}"
        out.append(sent)
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or []]
    return {"messages": out} | ({"tools": wrapped} if wrapped else {})


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of its refusal, in a line."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        said = json.loads(text)
        said = said.get("error", said) if isinstance(said, dict) else said
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    except ValueError:
        pass
    return " ".join(text.split())[:200] or str(error.reason)


def _seconds(header: str | None, otherwise: float) -> float:
    """Retry-After in seconds; a date, or nothing, leaves the wait as it was."""
    try:
        return min(max(float(header or ""), 0.0), LONGEST_WAIT)
    except ValueError:
        return otherwise
