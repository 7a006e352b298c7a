"""A real llama.cpp out of the `xllamacpp` wheel, asked over HTTP. The KV cache is in fp32 and flash
attention is off: on a CPU it adds up in f16, and either moves near ties (logprobs by 5e-3, without both by 1e-5)."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """One GGUF behind llama.cpp's server, in this process."""

    def __init__(self, path: Path, context: int = 512) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="no llama.cpp here: pip install xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.use_jinja = True
        params.warmup = False
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            params.port = free.getsockname()[1]
        self._server = xllamacpp.Server(params)
        self._url = self._server.listening_address

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def greedy(self, prompt: list[int], new: int, ignore_eos: bool = False) -> list[int]:
        body = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": ignore_eos, "return_tokens": True}
        return self.ask("/completion", {**body, "cache_prompt": False, "samplers": ["top_k"], "top_k": 1})["tokens"]

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": special}
        return self.ask("/tokenize", body)["tokens"]

    def prompt(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.ask("/apply-template", {"messages": messages, **options})["prompt"]

    def next_logprobs(self, prompt: list[int]) -> dict[int, float]:
        """Log probabilities of the likeliest tokens after `prompt`; empty where the first is a part of a character,
        of which the server does not speak."""
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 20, "cache_prompt": False}
        found = self.ask("/completion", {**body, "ignore_eos": True}).get("completion_probabilities", [])
        return {each["id"]: each["logprob"] for each in found[0]["top_logprobs"]} if found else {}
