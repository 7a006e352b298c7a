"""A judge behind a URL: marks, what is kept, and servers that fail."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from groundup.errors import UserError
from groundup.rewards.build import build_rewards
from groundup.rewards.judge import Judge

Reply = Callable[[dict[str, Any]], tuple[int, str]]


class Server:
    """An OpenAI-compatible server whose answers the test decides; `asked` are the bodies of its requests."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply: Reply = lambda body: (200, "Score: 10")
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                status, text = outer.reply(body)
                said = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
                data = json.dumps(said if status == 200 else {"error": {"message": text}}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def asks_for(body: dict[str, Any], answer: str) -> bool:
    return f"\n{answer}\n" in body["messages"][0]["content"]


def ask(judge: Judge, *completions: str, answer: list[Any] | None = None) -> list[float | None]:
    prompts = [[{"role": "user", "content": "Why is {answer} blue?"}]] * len(completions)
    return judge(prompts, list(completions), answer)


def test_marks_are_shares_of_the_scale(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    marks = {
        "good": "It is right.\nScore: 10", "bad": "**Score**: 1/10", "fair": "评分：5.5", "bench": "Rating: [[7]]",
        "bare": " 4 ", "off": "Score: 11", "mute": "I would rather not say.", "two": "Score: 2\n... Score: 3",
    }  # fmt: skip
    server.reply = lambda body: (200, next(text for name, text in marks.items() if asks_for(body, name)))
    judge = Judge(server.url, "critic", cache=str(tmp_path / "kept.jsonl"), api_key_env="JUDGE_KEY")
    found = ask(judge, *marks, answer=["because"] * 8)
    assert found == [1, 0, 0.5, pytest.approx(6 / 9), pytest.approx(3 / 9), None, None, pytest.approx(2 / 9)]
    assert set(server.keys) == {"Bearer secret"}
    body = server.asked[0]
    assert body["model"] == "critic" and body["temperature"] == 0
    assert "because" in body["messages"][0]["content"] and "Why is {answer} blue?" in body["messages"][0]["content"]


def test_each_answer_is_asked_once_and_kept(server: Server, tmp_path: Path) -> None:
    kept = tmp_path / "deep" / "kept.jsonl"
    assert ask(Judge(server.url, "m", cache=str(kept)), "a", "b", "a", "a") == [1] * 4
    assert len(server.asked) == 2
    kept.write_bytes(kept.read_bytes() + b'{"key": "cut off')
    again = Judge(server.url, "m", cache=str(kept))
    assert ask(again, "b", "c") == [1, 1]
    assert len(server.asked) == 3
    assert ask(Judge(server.url, "m", cache=str(kept)), "a", "b", "c") == [1] * 3  # a cut line harms no other
    assert len(server.asked) == 3
    ask(Judge(server.url, "m", cache=str(kept), temperature=0.5), "a")  # another request
    ask(Judge(server.url, "m", cache=False), "a")
    assert len(server.asked) == 5


def test_requests_are_parallel(server: Server) -> None:
    together = threading.Barrier(4)

    def reply(body: dict[str, Any]) -> tuple[int, str]:
        together.wait(10)
        return 200, "Score: 10"

    server.reply = reply
    assert ask(Judge(server.url, "m", cache=False, parallel=4, retries=0), *"abcd") == [1] * 4


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.reply = lambda body: (200, "Score: 10") if len(server.asked) > 2 else (503, "busy")
    assert ask(Judge(server.url, "m", cache=False, retries=3), "a") == [1]
    assert len(server.asked) == 3


def test_some_without_an_answer_are_not_judged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.reply = lambda body: (500, "broken") if asks_for(body, "b") else (200, "Score: 10")
    with caplog.at_level(logging.WARNING):
        assert ask(Judge(server.url, "m", cache=False, retries=0), "a", "b") == [1, None]
    assert "did not answer 1 of 2 requests (HTTP 500: broken)" in caplog.text
    args = {"url": server.url, "model": "m", "cache": False, "retries": 0}
    rewards = build_rewards([{"name": "judge", "args": args}])
    totals, _ = rewards([[{"role": "user", "content": "?"}]] * 2, ["a", "b"], {})
    assert totals[0] == 1 and math.isnan(totals[1])


def test_a_server_that_is_no_use_ends_the_run(server: Server) -> None:
    server.reply = lambda body: (401, "wrong key")
    with pytest.raises(UserError, match="HTTP 401: wrong key"):
        ask(Judge(server.url, "m", cache=False), "a")
    server.reply = lambda body: (500, "broken")
    with pytest.raises(UserError, match=r"answered none of 2 requests \(HTTP 500: broken\)"):
        ask(Judge(server.url, "m", cache=False, retries=0), "a", "b")
    server.reply = lambda body: (200, "no mark at all")
    with pytest.raises(UserError, match="none of the answers a mark"):
        ask(Judge(server.url, "m", cache=False), *"abcdefgh")
    assert ask(Judge(server.url, "m", cache=False), "a") == [None]  # one may be hard to mark
    with pytest.raises(UserError, match="answered none of 1 requests"):
        ask(Judge("http://127.0.0.1:9/v1", "m", cache=False, retries=0), "a")


def test_a_server_that_hangs_does_not_hold_up_the_run(server: Server) -> None:
    free = threading.Event()
    server.reply = lambda body: (200, "Score: 10") if asks_for(body, "a") else (free.wait(20) and 500, "")
    started = time.perf_counter()
    assert ask(Judge(server.url, "m", cache=False, seconds=0.7, retries=0), "a", "b") == [1, None]
    assert time.perf_counter() - started < 5
    free.set()


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for wrong in ({"template": "grade it"}, {"scale": [5, 1]}, {"parallel": 0}):
        with pytest.raises(ValueError, match=r"template|scale|parallel"):
            Judge("http://x/v1", "m", cache=False, **wrong)
