"""POST /score: a reward model's numbers over HTTP, alone or beside a model that writes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from api_server import tiny_pair
from fastapi.testclient import TestClient

from groundup.errors import UserError
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.scoring import Scorer
from groundup.infer.worker import Draining, Limits, QueueFull, RequestTimeout, Worker
from groundup.model.scored import Scored, begin_scored, save_scorer
from groundup.model.transformer import Transformer
from groundup.serve.api import create_app, serve
from groundup.serve.api_models import Served, ServerSettings
from groundup.serve.api_score import MOST, ScoreWorker, ServedScorer
from groundup.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "sat on the mat."}]
OTHER = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Rome\nagain 1 2\n3"}]


@pytest.fixture(scope="module")
def pair() -> tuple[Transformer, Tokenizer]:
    return tiny_pair()


def reward_model(pair: tuple[Transformer, Tokenizer], label: str = "reward") -> tuple[Scored, Tokenizer]:
    model = begin_scored(tiny_pair()[0], 0, label)
    with torch.no_grad():
        model.score.weight.mul_(30)
    return model, pair[1]


@pytest.fixture(scope="module")
def client(pair: tuple[Transformer, Tokenizer]) -> Iterator[TestClient]:
    """A model that writes, "tiny", and two that score, "nice" and "steps"."""
    worker = Worker(Engine(pair[0], pair[1], EngineSettings(num_blocks=64)))
    scorers = [
        ServedScorer(name, ScoreWorker(Scorer(*reward_model(pair, label))))
        for name, label in (("nice", "reward"), ("steps", "step_right"))
    ]
    served = Served("tiny", worker, pair[1], worker.engine.context)
    with TestClient(create_app([served], ServerSettings(), scorers), raise_server_exceptions=False) as made:
        yield made


def test_scores_are_the_scorers(client: TestClient, pair: tuple[Transformer, Tokenizer]) -> None:
    wanted = Scorer(*reward_model(pair)).score([CHAT, OTHER])
    answer = client.post("/score", json={"messages": [CHAT, OTHER]}).json()
    assert answer["object"] == "list" and answer["model"] == "nice" and answer["label"] == "reward"
    assert [one["score"] for one in answer["data"]] == wanted and [one["index"] for one in answer["data"]] == [0, 1]
    tokens = sum(len(pair[1].render(said).ids) for said in (CHAT, OTHER))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    one = client.post("/score", json={"messages": OTHER, "model": "nice"}).json()
    assert [each["score"] for each in one["data"]] == wanted[1:], "one conversation need not be a list of them"


def test_a_process_reward_model_tells_every_line(client: TestClient, pair: tuple[Transformer, Tokenizer]) -> None:
    (found,) = client.post("/score", json={"messages": OTHER, "model": "steps"}).json()["data"]
    steps = Scorer(*reward_model(pair, "step_right")).score_steps([(OTHER[:1], ["Rome", "again 1 2", "3"])])[0]
    assert found["step_scores"] == pytest.approx(steps) and found["score"] == min(found["step_scores"])


def test_both_kinds_are_listed_and_keep_to_their_work(client: TestClient) -> None:
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "nice", "steps"]
    assert client.get("/v1/models/nice").json()["max_model_len"] == 1024
    asked = client.post("/v1/chat/completions", json={"model": "nice", "messages": CHAT[:1], "max_tokens": 1})
    assert asked.status_code == 404 and "it scores answers (POST /score)" in asked.json()["error"]["message"]
    scored = client.post("/score", json={"model": "tiny", "messages": CHAT})
    assert scored.status_code == 404 and "no reward model `tiny`; there are: nice, steps" in scored.text
    assert client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1}).status_code == 200
    assert client.get("/health").status_code == 200
    assert 'groundup_requests_total{path="/score",status="200"}' in client.get("/metrics").text


@pytest.mark.parametrize(("body", "param", "said"), [
    ({}, "messages", "messages"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [[]]}, "messages[0]", "at least 1"),
    ({"messages": [CHAT, [5]]}, "messages[1][0]", "dictionary"),
    ({"messages": CHAT[:1]}, "messages", "must end with the answer"),
    ({"messages": [CHAT, CHAT[:1]]}, "messages[1]", "must end with the answer"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "system"),
    ({"messages": [CHAT] * (MOST + 1)}, "messages", f"at most {MOST}"),
    ({"messages": [*CHAT[:1], {"role": "assistant", "content": "cat " * 2000}]}, "messages", "do not fit"),
    ({"messages": CHAT, "tools": [5]}, "tools[0]", "dictionary"),
])  # fmt: skip
def test_a_fault_names_its_field(client: TestClient, body: dict[str, Any], param: str, said: str) -> None:
    answer = client.post("/score", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"]
    assert client.post("/score", json={"messages": CHAT}).status_code == 200


def test_a_server_of_a_reward_model_alone(pair: tuple[Transformer, Tokenizer]) -> None:
    scorer = ServedScorer("nice", ScoreWorker(Scorer(*reward_model(pair))))
    with TestClient(create_app([], ServerSettings(api_key="k"), [scorer])) as client:
        assert client.post("/score", json={"messages": CHAT}).status_code == 401
        client.headers["Authorization"] = "Bearer k"
        assert client.post("/score", json={"messages": CHAT}).status_code == 200
        answer = client.post("/v1/chat/completions", json={"messages": CHAT})
        assert answer.status_code == 404 and "writes none" in answer.json()["error"]["message"]
        asyncio.run(scorer.worker.drain(1))
        assert client.post("/score", json={"messages": CHAT}).status_code == 503
        assert client.get("/health").status_code == 503


def test_a_server_without_reward_model_says_how_to_get_one(pair: tuple[Transformer, Tokenizer]) -> None:
    worker = Worker(Engine(pair[0], pair[1], EngineSettings(num_blocks=64)))
    with TestClient(create_app([Served("tiny", worker, pair[1], worker.engine.context)])) as client:
        answer = client.post("/score", json={"messages": CHAT})
        assert answer.status_code == 404 and "--scorer NAME=PATH" in answer.json()["error"]["message"]


def test_two_models_of_one_name_are_refused(pair: tuple[Transformer, Tokenizer]) -> None:
    scorers = [ServedScorer("nice", ScoreWorker(Scorer(*reward_model(pair)))) for _ in range(2)]
    with pytest.raises(UserError, match="nice: two models have this name"):
        create_app([], None, scorers)


def test_requests_wait_in_line_and_no_longer_than_told(pair: tuple[Transformer, Tokenizer]) -> None:
    async def scenario() -> None:
        worker = ScoreWorker(Scorer(*reward_model(pair)), Limits(max_waiting=1, request_timeout=0.3))
        gate, done = threading.Event(), []
        first = asyncio.create_task(worker.run(lambda: gate.wait(5) and done.append(1)))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(worker.run(lambda: done.append(2)))
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull):
            await worker.run(lambda: None)
        gate.set()
        await asyncio.gather(first, second)
        assert done == [1, 2] and worker.in_flight == 0
        gate.clear()
        with pytest.raises(RequestTimeout):
            await worker.run(lambda: gate.wait(5))
        gate.set()
        await worker.drain(0.1)
        with pytest.raises(Draining):
            await worker.run(lambda: None)
        worker.stop()

    asyncio.run(scenario())


def test_the_command_knows_a_reward_models_folder(pair: tuple[Transformer, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = reward_model(pair)
    save_scorer(model, tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="--quantize: is for a model that writes, and this one scores"):
        serve(tmp_path, port=0, quantize="int8", device="cpu")
    with pytest.raises(UserError, match="--scorer: 'nice' names no folder"):
        serve(tmp_path, port=0, scorers=["nice"], device="cpu")
