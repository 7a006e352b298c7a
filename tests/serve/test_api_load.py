"""The server under load and at its end: queues, timeouts, clients that leave, faults, figures, SIGTERM."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from api_server import Api, Steps, api, pair, save_pair, steps  # noqa: F401  (fixtures)
from safetensors.torch import save_file

from groundup.errors import UserError
from groundup.infer.generate import generate
from groundup.infer.params import SamplingParams
from groundup.infer.worker import Limits
from groundup.serve.api import listen, serve
from groundup.serve.api_models import Models, ServerSettings

CHAT = {"messages": [{"role": "user", "content": "The cat"}]}
LONG = {**CHAT, "max_tokens": 500, "ignore_eos": True}


def watch(api: Api, monkeypatch) -> list:  # noqa: F811
    """All requests that the engine gets from now on."""
    requests: list = []
    add = api.engine.add

    def noted(*args, **more):
        requests.append(add(*args, **more))
        return requests[-1]

    monkeypatch.setattr(api.engine, "add", noted)
    return requests


def aborted(requests: list) -> bool:
    return [s.finish_reason for r in requests for s in r.sequences] == ["abort"] * len(requests)


def test_a_stream_whose_client_leaves_is_aborted(api: Api, steps: Steps, monkeypatch) -> None:  # noqa: F811
    requests = watch(api, monkeypatch)
    steps.allow(3)
    with api.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
        next(answer.iter_lines())
    api.wait_inbox()
    steps.close()
    api.wait_idle()
    assert aborted(requests)
    assert api.engine.stats()["blocks_used"] == 0


@pytest.mark.parametrize("first_tokens", [0, 3])
def test_a_client_that_leaves_while_it_waits_is_noticed(api: Api, steps: Steps, monkeypatch, first_tokens) -> None:  # noqa: F811
    """Before the first token of a stream, and in the middle of an answer that comes whole."""
    requests = watch(api, monkeypatch)
    body = json.dumps({**LONG, "stream": not first_tokens}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", api.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        api.wait_in_flight(1)
        steps.allow(first_tokens)
    api.wait_inbox()
    steps.close()
    api.wait_idle()
    assert aborted(requests)
    assert api.engine.stats()["blocks_used"] == 0


def test_a_full_queue_is_429_with_a_time(pair) -> None:  # noqa: F811
    """One answer at once and one that waits: the third is sent away at once, and the others are answered."""
    small = Api(*pair, limits=Limits(max_waiting=1), max_sequences=1)
    gate = Steps(small.engine)
    with ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(small.chat, max_tokens=3) for _ in range(2)]
        small.wait_in_flight(2)
        answer = small.post("/v1/chat/completions", CHAT)
        with pytest.raises(openai.RateLimitError):
            small.chat()
        busy = small.post("/v1/completions", {"prompt": "x"})
        gate.close()
        assert [task.result().usage.completion_tokens for task in taken] == [3, 3]
    assert answer.status_code == busy.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert small.chat(max_tokens=1).usage.completion_tokens == 1
    small.close()


def test_the_tokens_taken_are_bounded(pair) -> None:  # noqa: F811
    small = Api(*pair, limits=Limits(max_total_tokens=100))
    answer = small.post("/v1/chat/completions", {**CHAT, "max_tokens": 100})
    assert answer.status_code == 400 and "100 in all" in answer.text
    gate = Steps(small.engine)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(small.chat, max_tokens=60)
        small.wait_in_flight(1)
        assert small.post("/v1/chat/completions", {**CHAT, "max_tokens": 60}).status_code == 429
        gate.close()
        first.result()
    small.close()


def test_a_request_that_takes_too_long(pair) -> None:  # noqa: F811
    """Before the first token an error, later an event of the stream."""
    slow = Api(*pair, limits=Limits(request_timeout=0))
    answer = slow.post("/v1/chat/completions", LONG)
    assert answer.status_code == 408 and answer.json()["error"]["type"] == "timeout_error"
    assert slow.post("/v1/chat/completions", {**LONG, "stream": True}).status_code == 408
    assert slow.engine.stats()["blocks_used"] == 0
    slow.close()


def test_an_engine_error_fails_its_request_and_not_the_server(api: Api, monkeypatch) -> None:  # noqa: F811
    step = api.engine.step
    left = [0]

    def fails():
        if left[0] == 0:
            monkeypatch.setattr(api.engine, "step", step)
            raise RuntimeError("secret detail in /some/path.py")
        left[0] -= 1
        return step()

    monkeypatch.setattr(api.engine, "step", fails)
    answer = api.post("/v1/chat/completions", LONG)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text
    left[0] = 3
    monkeypatch.setattr(api.engine, "step", fails)
    answer = api.post("/v1/chat/completions", {**LONG, "stream": True})
    assert answer.status_code == 200
    *_, error, done = answer.text.rstrip("\n").split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error" and "secret" not in error
    assert api.http.get("/health").status_code == 200
    assert api.chat(max_tokens=2).usage.completion_tokens == 2
    assert api.engine.stats()["blocks_used"] == 0


def test_the_clients_own_error_for_a_broken_stream(api: Api, monkeypatch) -> None:  # noqa: F811
    step, left = api.engine.step, [3]

    def fails():
        left[0] -= 1
        if left[0] < 0:
            monkeypatch.setattr(api.engine, "step", step)
            raise RuntimeError("no")
        return step()

    monkeypatch.setattr(api.engine, "step", fails)
    with pytest.raises(openai.APIError, match="failed on this request"):
        list(api.chat(stream=True, max_tokens=50, extra_body={"ignore_eos": True}))


def test_a_fault_of_our_own_tells_nothing(api: Api, monkeypatch) -> None:  # noqa: F811
    def broken(*_) -> None:
        raise RuntimeError("secret /some/path.py")

    monkeypatch.setattr("groundup.serve.api_chat.chat_params", broken)
    answer = api.post("/v1/chat/completions", CHAT)
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "The server failed on this request")
    assert "secret" not in answer.text


def test_metrics(pair) -> None:  # noqa: F811
    fresh = Api(*pair)
    fresh.chat(max_tokens=4, extra_body={"ignore_eos": True})
    fresh.post("/v1/chat/completions", {})
    fresh.http.get("/nowhere")
    prompt = fresh.engine.stats()["prompt_tokens"]
    answer = fresh.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert lines['groundup_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert lines['groundup_requests_total{path="/v1/chat/completions",status="400"}'] == "1.0"
    assert lines['groundup_requests_total{path="other",status="404"}'] == "1.0"
    assert lines['groundup_generated_tokens_total{model="tiny"}'] == "4.0"
    assert float(lines['groundup_prompt_tokens_total{model="tiny"}']) == prompt > 0
    assert lines['groundup_blocks_used{model="tiny"}'] == lines['groundup_running{model="tiny"}'] == "0.0"
    assert lines['groundup_blocks_total{model="tiny"}'] == "256.0"
    assert lines['groundup_time_to_first_token_seconds_count{model="tiny"}'] == "1.0"
    assert lines['groundup_time_per_output_token_seconds_count{model="tiny"}'] == "1.0"
    other = Api(*pair)  # figures are an app's own
    assert 'path="/v1/chat/completions"' not in other.http.get("/metrics").text
    fresh.close()
    other.close()


def test_embeddings_beside_answers_under_way(api: Api) -> None:  # noqa: F811
    texts = ["The cat sat on the mat. " * 8] * 30
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(api.chat, max_tokens=60, extra_body={"ignore_eos": True})
        vectors = api.client.embeddings.create(model="tiny", input=texts).data
        assert answer.result().usage.completion_tokens == 60
    assert len(vectors) == 30


class Process:
    """`serve` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        code = f"from groundup.serve.api import serve; serve({str(folder)!r}, port=0, device='cpu')"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert "groundup serves" in line, line + self.process.stderr.read()
        self.url = line.split(" at ")[1].split("/v1")[0]

    def end(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        return self.process.wait(60), said


def test_sigterm_finishes_what_runs(pair, tmp_path: Path) -> None:  # noqa: F811
    """The running answer gets all its tokens, and the process leaves with 0 and without a word."""
    server = Process(save_pair(pair, tmp_path / "tiny"))
    body = {**CHAT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            said = [line for line in lines if line]
    assert said[-1] == "data: [DONE]"
    assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    code, errors = server.end()
    assert (code, errors) == (0, "")


def test_sigterm_waits_no_longer_than_told(pair) -> None:  # noqa: F811
    hasty = Api(*pair, settings=ServerSettings(drain_seconds=0))
    gate = Steps(hasty.engine)
    gate.allow(3)
    with hasty.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        hasty.server.handle_exit(signal.SIGTERM, None)
        hasty.wait_inbox()
        gate.close()
        said = [line for line in lines if line]
    assert "shutting down" in said[-2] and said[-1] == "data: [DONE]"
    hasty._thread.join(20)  # it left by itself
    assert not hasty._thread.is_alive()
    hasty.close()


def test_while_it_drains_new_requests_are_503(pair) -> None:  # noqa: F811
    draining = Api(*pair)
    gate = Steps(draining.engine)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(draining.chat, max_tokens=5, extra_body={"ignore_eos": True})
        draining.wait_in_flight(1)
        draining.worker.refuse()
        answer = draining.post("/v1/chat/completions", CHAT)
        health = draining.http.get("/health")
        gate.close()
        assert running.result().usage.completion_tokens == 5
    assert answer.status_code == health.status_code == 503
    assert "retry-after" in answer.headers and "shutting down" in answer.json()["error"]["message"]
    draining.close()


def test_faults_at_the_start_are_one_line(pair, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="no such folder"):
        serve(tmp_path / "nothing", port=0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(tmp_path, port=port)
    with pytest.raises(UserError, match="cannot listen on"):
        serve(tmp_path, port=99999)


def test_no_thread_is_left(pair) -> None:  # noqa: F811
    before = threading.active_count()
    running = Api(*pair)
    running.chat(max_tokens=2)
    running.close()
    assert "groundup-engine" not in [thread.name for thread in threading.enumerate()][before:]


def test_tokens_are_sent_at_once() -> None:
    """The server's side of a connection does not gather small writes (asyncio looks at the listener's protocol)."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_adapters_are_models_of_their_own(pair, tmp_path: Path) -> None:  # noqa: F811
    """Named like a model, they answer as the base with their weights merged in, beside it and in the same batch."""
    model, tokenizer = pair
    a, b = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), torch.ones(64, 2)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    merged = copy.deepcopy(model)
    merged.blocks[0].self_attn.q_proj.weight.data += b @ a
    prompt, params = [9, 8, 7, 6, 5] * 8, SamplingParams(max_tokens=20, ignore_eos=True)
    wanted = {"tiny": generate(model, tokenizer, [prompt], params)[0].text}
    wanted["poet"] = generate(merged, tokenizer, [prompt], params)[0].text
    assert wanted["poet"] != wanted["tiny"]
    api = Api(copy.deepcopy(model), tokenizer, adapters={"poet": tmp_path})  # noqa: F811
    cards = {card.id: card for card in api.client.models.list().data}
    assert (cards["poet"].parent, cards["tiny"].parent) == ("tiny", None)

    def ask(name: str) -> tuple[str, str]:
        answer = api.client.completions.create(
            model=name, prompt=prompt, max_tokens=20, extra_body={"ignore_eos": True}
        )
        return answer.model, answer.choices[0].text

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, ["tiny", "poet"] * 4)) == list(wanted.items()) * 4
    assert api.post("/v1/embeddings", {"model": "poet", "input": "x"}).status_code == 400
    api.close()
    with pytest.raises(UserError, match="two models have this name"):
        Models([api.served, api.served])


def test_a_short_soak(api: Api) -> None:  # noqa: F811
    """Mixed requests at once, some given up, some bad: every answer is the one given alone, and no block is left."""

    def body(i: int) -> dict:
        text = "The cat sat. " * (1 + i % 4)
        more = {"temperature": 1.0, "seed": i} if i % 3 else {}
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 10 + i % 30, **more}

    def ask(i: int) -> object:
        if i % 8 == 3:
            return api.post("/v1/chat/completions", {**body(i), "top_p": 7}).status_code
        if i % 8 == 5:
            with api.http.stream("POST", "/v1/chat/completions", json={**body(i), "stream": True}) as answer:
                return next(answer.iter_lines())[:5]
        if i % 2:
            pieces = api.events("/v1/chat/completions", body(i))
            return "".join(c["choices"][0]["delta"].get("content") or "" for c in pieces)
        return api.post("/v1/chat/completions", body(i)).json()["choices"][0]["message"]["content"]

    alone = [ask(i) for i in range(48)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(48))) == alone
    api.wait_idle()
    assert api.engine.stats()["blocks_used"] == 0
    assert alone.count(400) == 6
