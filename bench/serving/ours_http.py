"""`groundup serve` through its HTTP door: /v1/completions, streamed, a thread a request."""

from __future__ import annotations

import json
import time
from typing import Any

from bench.serving.client import ServerProcess, at_once, free_port, get, post
from bench.serving.commands import GROUNDUP
from bench.serving.rounds import Server, Watch, run


class OursHttp(Server):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        options = ["--quantize", spec["quantize"]] if spec["quantize"] else []
        port = free_port()
        self.server = ServerProcess([*GROUNDUP, "serve", spec["model"], "--port", str(port), *options], port)
        self.pid = self.server.process.pid
        self.name = json.loads(get(self.server.address, "/v1/models")[1])["data"][0]["id"]

    def answer(self, prompts: list[list[int]], new: int, cache: bool, watch: Watch) -> None:
        def one(place: int) -> None:
            body = {"model": self.name, "prompt": prompts[place], "max_tokens": new, "temperature": 0,
                    "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
            times, tokens = [], 0
            for event in post(self.server.address, "/v1/completions", body).events():
                if event == "[DONE]":
                    break
                chunk = json.loads(event)
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                elif chunk["choices"] and chunk["choices"][0].get("text"):  # bytes of half a character are held back
                    times.append(time.perf_counter())
            watch.spread(place, times or [time.perf_counter()], tokens)

        at_once(len(prompts), one)

    def close(self) -> None:
        self.server.stop()


if __name__ == "__main__":
    run(OursHttp)
