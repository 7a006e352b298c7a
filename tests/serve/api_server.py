"""A real server in a thread, for the tests of the API: the app under uvicorn on a free port, and clients for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.sampler import token_logprob
from groundup.infer.worker import Limits, Worker
from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.serve.api import Server, create_app, listen
from groundup.serve.api_models import Served, ServerSettings
from groundup.tokenizer import Tokenizer, train_tokenizer

CONTEXT = 1024
TEXT = """The cat sat on the mat. 小猫坐在垫子上，看着月亮。 Why? {"name": "a", "arguments": {"city": "Rome"}} again.
{"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": {"type": "object",
"properties": {"city": {"type": "string"}}, "required": ["city"]}}} system user assistant tool true false 0 1 2 3"""


def tiny_pair() -> tuple[Transformer, Tokenizer]:
    """Random weights, logits far enough apart that rounding decides no argmax."""
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([TEXT] * 20, 420)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval(), tokenizer


class Api:
    """A running server. client: the OpenAI client; http: plain HTTP; worker, engine: what is behind it."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: ServerSettings | None = None,
        limits: Limits | None = None,
        adapters: Mapping[str, Path] | None = None,
        **engine: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, tokenizer, EngineSettings(num_blocks=256, **engine))
        self.worker = Worker(self.engine, limits)
        for name, path in (adapters or {}).items():
            self.engine.load_adapter(name, path)
        self.served = Served("tiny", self.worker, tokenizer, self.engine.context, adapters=tuple(adapters or ()))
        self.app = create_app([self.served], settings)
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.app, log_level="critical", timeout_graceful_shutdown=5)
        self.server = Server(config, [self.served], settings or ServerSettings())
        self._thread = threading.Thread(target=self.server.run, args=([listener],))
        self._thread.start()
        key = (settings.api_key if settings else None) or "none"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        self.client.close()
        self.http.close()
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def chat(self, text: str = "The cat", **more: Any) -> Any:
        messages = more.pop("messages", [{"role": "user", "content": text}])
        return self.client.chat.completions.create(model="tiny", messages=messages, **more)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All chunks of a stream, which must end as streams do."""
        answer = self.http.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("\n\n")
        lines = answer.text.rstrip("\n").split("\n\n")
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def wait_in_flight(self, answers: int) -> None:
        wake = self.worker._wake
        with wake:
            assert wake.wait_for(lambda: sum(h.sequences for h in self.worker._live) == answers, 30)

    def wait_inbox(self) -> None:
        """Until something is to be done between two steps, or it is done already and nobody is left."""
        with self.worker._wake:
            assert self.worker._wake.wait_for(lambda: bool(self.worker._inbox) or not self.worker._live, 30)

    def wait_idle(self) -> None:
        assert self.worker._wait_idle(30)


class Steps:
    """Lets the engine take so many steps and no more; close() lets it run."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._step = engine, engine.step
        self._allowed = threading.Semaphore(0)
        self._free = False
        engine.step = self._limited  # type: ignore[method-assign]

    def allow(self, count: int) -> None:
        if count:
            self._allowed.release(count)

    def close(self) -> None:
        self._free = True
        self._allowed.release()
        self._engine.__dict__.pop("step", None)

    def _limited(self) -> Any:
        if not self._free:
            assert self._allowed.acquire(timeout=60)
        return self._step()


@pytest.fixture
def steps(api: Api) -> Iterator[Steps]:
    limited = Steps(api.engine)
    yield limited
    limited.close()
    api.wait_idle()


@pytest.fixture
def script(api: Api, monkeypatch: pytest.MonkeyPatch):
    """script(text): every answer says this from now on, special tokens among it counting as such, and then ends."""

    def says(text: str, ends: bool = True) -> list[int]:
        ids: list[int] = api.tokenizer.backend.encode(text, add_special_tokens=False).ids
        each = [*ids, api.tokenizer.eos_id] if ends else ids
        said: dict[int, int] = {}
        kept = []  # so that no id() is given twice

        def sample(logits_BV: torch.Tensor, states: Sequence[Any]) -> tuple[list[int], list[Any]]:
            chosen = []
            for state in states:
                kept.append(state)
                said[id(state)] = said.get(id(state), -1) + 1
                chosen.append(each[said[id(state)] % len(each)])
            logprobs = [
                None if state.params.logprobs is None else token_logprob(row, token, state.params.logprobs)
                for row, token, state in zip(logits_BV, chosen, states, strict=True)
            ]
            return chosen, logprobs

        monkeypatch.setattr("groundup.infer.engine.sample", sample)
        return ids

    return says


@pytest.fixture(scope="module")
def pair() -> tuple[Transformer, Tokenizer]:
    return tiny_pair()


@pytest.fixture(scope="module")
def api(pair: tuple[Transformer, Tokenizer]) -> Iterator[Api]:
    running = Api(*pair)
    yield running
    running.close()


def save_pair(pair: tuple[Transformer, Tokenizer], path: Path) -> Path:
    save_model(pair[0], path)
    pair[1].save(path)
    return path
