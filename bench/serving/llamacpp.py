"""llama.cpp's own server out of the `xllamacpp` wheel, by HTTP: /completion, streamed, a thread a request.

As many slots as requests, a slot as long as a request is; continuous batching and its KV cache in f16 are its defaults.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

import xllamacpp

from bench.serving.client import at_once, free_port, post
from bench.serving.rounds import Server, Watch, run


class LlamaCpp(Server):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        params = xllamacpp.CommonParams()
        params.model.path = spec["gguf"]
        params.n_parallel = spec["requests"]
        params.n_ctx = spec["requests"] * spec["context"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec["threads"]
        params.n_threads_http = spec["requests"] + 2
        params.port = free_port()
        params.cache_ram_mib = 0  # a copy of idle slots, of no use here
        self.server = xllamacpp.Server(params)
        where = urlsplit(self.server.listening_address)
        self.address = (where.hostname or "127.0.0.1", where.port or params.port)

    def answer(self, prompts: list[list[int]], new: int, cache: bool, watch: Watch) -> None:
        def one(place: int) -> None:
            body = {"prompt": prompts[place], "n_predict": new, "temperature": 0, "ignore_eos": True, "stream": True,
                    "cache_prompt": cache, "return_tokens": True, "timings_per_token": True}  # fmt: skip
            for event in post(self.address, "/completion", body).events():
                chunk = json.loads(event)
                last = chunk.get("stop")
                total = chunk["timings"]["predicted_n"] if "timings" in chunk else None
                watch.came(place, [] if last else chunk.get("tokens", []), total)

        at_once(len(prompts), one)


if __name__ == "__main__":
    run(LlamaCpp)
