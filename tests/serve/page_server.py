"""What the page's tests talk to: a server whose answers depend on the question alone, and `ui` in a process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

WAIT = 20  # seconds until a test gives up on something that should come at once

MODELS = [
    {"id": "base", "object": "model"},
    {"id": "poet", "object": "model", "parent": "base"},
    {"id": "seer", "object": "model", "capabilities": {"vision": True}},
]
REASONING = "The question names two numbers. Seventeen and five are twenty-two."
TOOL_ARGUMENTS = '{"city": "上海", "days": 2}'


class PageServer:
    """Answers "<model> says: <question>", word by word. Questions that begin with these words do more:

    slow    three words, then nothing until `release()` or until the client leaves (`aborted`)
    think   reasoning first; "think slow" holds between reasoning and answer
    tool    calls get_weather, its arguments in pieces
    fail    400 with an error of OpenAI's shape
    break   the connection ends in the middle
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.holding, self.aborted, self.gate = threading.Event(), threading.Event(), threading.Event()
        self.scripts: dict[str, dict[str, str]] = {}  # "question" or "model: question" -> parts
        self.pace = 0.0  # seconds a word, for pictures with figures that look alive
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        app = FastAPI()
        app.get("/v1/models")(self._models)
        app.post("/v1/chat/completions")(self._chat)
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, log_level="critical", access_log=False, lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.requests.clear()
        for event in (self.holding, self.aborted, self.gate):
            event.clear()

    def release(self) -> None:
        self.gate.set()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": MODELS}

    async def _chat(self, request: Request) -> Any:
        body = await request.json()
        self.requests.append(body)
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if text.startswith("fail"):
            error = {"message": "max_tokens: must be at least 1", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(self._stream(request, body["model"], text), media_type="text/event-stream")

    async def _stream(self, request: Request, model: str, text: str) -> AsyncIterator[str]:
        head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": model}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return _sse({**head, "choices": [choice]})

        yield chunk({"role": "assistant", "content": ""})
        script = self.scripts.get(f"{model}: {text}") or self.scripts.get(text) or _script(model, text)
        words = 0
        for kind, said in script.items():
            if kind == "content" and "slow" in text:
                await self._hold(request)
            if kind == "call":
                call = {"index": 0, "id": "c1", "function": {"name": "get_weather", "arguments": ""}}
                yield chunk({"tool_calls": [call]})
            for word in re.findall(r"\S+\s*|\s+", said):
                delta = {"tool_calls": [{"index": 0, "function": {"arguments": word}}]}
                yield chunk(delta if kind == "call" else {_FIELD[kind]: word})
                words += 1
                await asyncio.sleep(self.pace)
        if text.startswith("break"):
            raise ConnectionResetError
        yield chunk({}, "tool_calls" if "call" in script else "stop")
        usage = {"prompt_tokens": 3, "completion_tokens": words, "total_tokens": 3 + words}
        yield _sse({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    async def _hold(self, request: Request) -> None:
        self.holding.set()
        try:
            while not self.gate.is_set():
                if await request.is_disconnected():
                    self.aborted.set()
                    return
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self.aborted.set()
            raise


_FIELD = {"reasoning": "reasoning_content", "before": "content", "content": "content"}


def _script(model: str, text: str) -> dict[str, str]:
    """What is said to a question, in order."""
    if text.startswith("tool"):
        return {"call": TOOL_ARGUMENTS}
    script = {"reasoning": REASONING} if text.startswith("think") else {}
    if text.startswith("slow"):
        script["before"] = "one two three "
    return script | {"content": f"{model} says: {text}"}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Command:
    """`ui(...)` in a process of its own, up when the constructor returns."""

    def __init__(self, directory: Path | None = None, url: str | None = None) -> None:
        target = repr(str(directory)) if directory else None
        code = f"from groundup.serve.ui import ui; ui({target}, url={url!r}, port={free_port()})"
        environment = os.environ | {"OPENAI_API_KEY": "none"}
        command = [sys.executable, "-c", code]
        # tests in the background of a shell ignore Ctrl-C, and their children would
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=heard)
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        said = next((line for line in lines if line.startswith("chat page: ")), None)
        assert said is not None, f"it ended with {self.process.wait()}"
        self.address = said.split()[2]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(3 * WAIT)
