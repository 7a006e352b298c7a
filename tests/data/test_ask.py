"""Asking a server for answers: every prompt once, whatever the server, the network and kill -9 do in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from groundup.data.ask import Asking, ask
from groundup.data.ask_wire import Answered, Rejected, Wire, as_request, read_answer
from groundup.data.read import read_rows
from groundup.data.rows import Chat
from groundup.errors import UserError

ASKING = Asking("teacher", max_tokens=50)


class Server:
    """Answers "say N" with "said N", or as `behave` wants: a reply's (status, body, headers) or None to hang up."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.behave: Callable[[str, int], tuple[int, Any, dict[str, str]] | None] = lambda text, nth: completion(text)
        self.lock, self.now, self.most, self.delay = threading.Lock(), 0, 0, 0.0
        self.seen: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with server.lock:
                    server.requests.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                    server.seen[text] += 1
                    nth, server.now = server.seen[text], server.now + 1
                    server.most = max(server.most, server.now)
                time.sleep(server.delay)
                found = server.behave(text, nth) if self.path == "/v1/chat/completions" else (404, {}, {})
                with server.lock:
                    server.now -= 1
                if found is None:
                    self.connection.close()
                    return
                status, reply, headers = found
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def completion(text: str, reason: str = "stop", **message: Any) -> tuple[int, Any, dict[str, str]]:
    said = {"role": "assistant", "content": text.replace("say", "said"), **message}
    return 200, {"choices": [{"message": said, "finish_reason": reason}]}, {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("groundup.data.ask_wire.FIRST_WAIT", 0.01)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(20)))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(path: Path) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows(path)]


SAID = [f"said {i}" for i in range(20)]


def test_every_prompt_is_asked_once_and_answered_in_order(server: Server, prompts: Path, tmp_path: Path) -> None:
    twice = tmp_path / "more.txt"
    twice.write_text("say 3\nsay 21\n\nsay 21\n")
    server.delay = 0.02
    report = ask([prompts, twice], tmp_path / "out.jsonl", Wire(server.url, "secret"), ASKING, parallel=4)
    assert answers(tmp_path / "out.jsonl") == [*SAID, "said 21"]
    assert (report["prompts"], report["duplicates"], report["rows"], report["asked"], report["rejected"]) == (
        21,
        2,
        21,
        21,
        0,
    )
    assert set(server.seen.values()) == {1} and set(server.keys) == {"Bearer secret"}
    assert 2 <= server.most <= 4
    assert server.requests[0].keys() == {"messages", "model", "max_tokens"}  # what is not set is the server's affair
    chats = list(read_rows(tmp_path / "out.jsonl"))
    assert all(isinstance(chat, Chat) and len(chat.messages) == 2 for chat in chats)


def test_the_same_command_again_asks_for_what_is_missing(server: Server, prompts: Path, tmp_path: Path) -> None:
    out, wire = tmp_path / "out.jsonl", Wire(server.url)
    assert ask([prompts], out, wire, ASKING, limit=5)["rows"] == 5
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) - 20])  # a kill has cut the last row
    server.seen.clear()
    report = ask([prompts], out, Wire(server.url), ASKING)
    assert report["asked"] == 16 and "said 0" not in {f"said {t[4:]}" for t in server.seen}
    assert answers(out) == SAID
    server.seen.clear()
    assert ask([prompts], out, Wire(server.url), ASKING)["asked"] == 0 and not server.seen


def test_killed_at_any_moment_it_goes_on(server: Server, prompts: Path, tmp_path: Path) -> None:
    server.delay = 0.04
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "groundup.cli", "distill", "ask", str(prompts), "--model", "m",
               "--url", server.url,
               "--parallel", "2", "--output", str(out)]  # fmt: skip
    child = subprocess.Popen(command, env={**os.environ, "NO_PROXY": "127.0.0.1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (out.exists() and out.read_bytes().count(b"\n") >= 5):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = out.read_bytes().count(b"\n")
    assert 5 <= kept < 20
    asked = sum(server.seen.values())
    time.sleep(0.1)
    done = subprocess.run(command, env={**os.environ, "NO_PROXY": "127.0.0.1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert answers(out) == SAID
    assert sum(server.seen.values()) - asked <= 20 - kept + 2  # what was on its way is asked again, no more


@pytest.mark.parametrize("fault", [429, 500, 503, "hang up", "garbage", "no choices"])
def test_what_may_pass_is_tried_again(fault: int | str, server: Server, prompts: Path, tmp_path: Path) -> None:
    def twice(text: str, nth: int) -> tuple[int, Any, dict[str, str]] | None:
        if nth > 2 or text != "say 7":
            return completion(text)
        if isinstance(fault, int):
            return fault, {"error": {"message": "not now"}}, {"Retry-After": "0.01"}
        return {"hang up": None, "garbage": (200, b"<html>", {}), "no choices": (200, {"error": "x"}, {})}[fault]

    server.behave = twice
    ask([prompts], tmp_path / "out.jsonl", Wire(server.url, timeout=5), ASKING)
    assert answers(tmp_path / "out.jsonl") == SAID
    assert server.seen["say 7"] == 3 and sum(server.seen.values()) == 22


def test_it_waits_as_long_as_the_server_says(server: Server, prompts: Path, tmp_path: Path) -> None:
    times: list[float] = []

    def busy(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        times.append(time.monotonic())
        return (429, {}, {"Retry-After": "0.4"}) if nth == 1 else completion(text)

    server.behave = busy
    ask([prompts], tmp_path / "out.jsonl", Wire(server.url), ASKING, limit=1)
    assert times[1] - times[0] >= 0.4


def test_pauses_grow_and_a_slow_answer_is_given_up(server: Server, prompts: Path, tmp_path: Path) -> None:
    times: list[float] = []

    def slow(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        times.append(time.monotonic())
        time.sleep(0.3)
        return completion(text)

    server.behave = slow
    with pytest.raises(UserError, match=r"1 of 1 prompts got no answer .*timed out"):
        ask([prompts], tmp_path / "out.jsonl", Wire(server.url, retries=2, timeout=0.05), ASKING, limit=1)
    assert len(times) == 3


def test_answers_that_teach_nothing_are_put_aside_and_not_asked_for_again(
    server: Server, prompts: Path, tmp_path: Path
) -> None:
    odd = {
        "say 1": completion("said", "length"), "say 2": completion("  "),
        "say 3": (400, {"error": {"message": "long"}}, {}),
        "say 4": completion("x", "content_filter"),
        "say 5": completion("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
    }  # fmt: skip
    server.behave = lambda text, nth: odd.get(text) or completion(text)
    out = tmp_path / "out.jsonl"
    report = ask([prompts], out, Wire(server.url), ASKING)
    assert (report["rows"], report["rejected"]) == (15, 5)
    assert answers(out) == [said for said in SAID if f"say {said[5:]}" not in odd]
    why = {row["messages"][-1]["content"]: row["why"] for row in rows(tmp_path / "out.jsonl.rejected.jsonl")}
    assert why["say 1"] == "cut at max_tokens" and why["say 2"] == "empty" and "HTTP 400: long" in why["say 3"]
    assert "filter" in why["say 4"] and "broken tool call" in why["say 5"]
    server.seen.clear()
    assert ask([prompts], out, Wire(server.url), ASKING)["rejected"] == 5 and not server.seen


@pytest.mark.parametrize(("status", "said"), [(401, "--api-key"), (403, "--api-key"), (404, "--url")])
def test_a_server_that_refuses_is_believed_at_once(
    status: int, said: str, server: Server, prompts: Path, tmp_path: Path
) -> None:
    server.behave = lambda text, nth: (status, {"error": {"message": "no such model"}}, {})
    with pytest.raises(UserError, match=f"HTTP {status}: no such model.*{said}"):
        ask([prompts], tmp_path / "out.jsonl", Wire(server.url), ASKING, parallel=2)
    assert sum(server.seen.values()) <= 4


def test_a_server_that_is_gone_ends_it_and_rows_are_kept(server: Server, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    server.behave = lambda text, nth: completion(text) if int(text[4:]) < 6 else None
    with pytest.raises(UserError, match=r"4 prompts after another got no answer.*the same command goes on"):
        ask([prompts], out, Wire(server.url, retries=1), ASKING, parallel=1)
    assert sorted(answers(out)) == SAID[:6]
    server.behave = lambda text, nth: completion(text)
    ask([prompts], out, Wire(server.url), ASKING)
    assert answers(out) == SAID
    with pytest.raises(UserError, match="refused"):
        ask([prompts], tmp_path / "b.jsonl", Wire("http://127.0.0.1:9/v1", retries=0), ASKING)


def test_some_without_an_answer_are_counted_and_asked_again(server: Server, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    server.behave = lambda text, nth: (500, {}, {}) if text in ("say 3", "say 9") else completion(text)
    with pytest.raises(UserError, match=r"2 of 20 prompts got no answer \(HTTP 500"):
        ask([prompts], out, Wire(server.url, retries=1), ASKING)
    assert len(answers(out)) == 18
    server.behave = lambda text, nth: completion(text)
    assert ask([prompts], out, Wire(server.url), ASKING)["asked"] == 2
    assert answers(out) == SAID


def test_another_model_does_not_mix_its_rows_in(server: Server, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ask([prompts], out, Wire(server.url), ASKING, limit=1)
    with pytest.raises(UserError, match="was begun with model=teacher, not other"):
        ask([prompts], out, Wire(server.url), Asking("other", max_tokens=50))
    (tmp_path / "mine.jsonl").write_text('{"text": "precious"}\n')
    with pytest.raises(UserError, match="was not written by ask"):
        ask([prompts], tmp_path / "mine.jsonl", Wire(server.url), ASKING)
    assert (tmp_path / "mine.jsonl").read_text() == '{"text": "precious"}\n'


def test_conversations_tools_and_thoughts_go_both_ways(server: Server, tmp_path: Path) -> None:
    """What is asked is OpenAI's; what is kept is read back as it was said."""
    tool = {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}
    chat = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "reasoning_content": "hm",
         "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "old answer"},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text(json.dumps({"conversations": chat, "tools": json.dumps([tool])}) + "\n")
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
    server.behave = lambda text, nth: completion(
        "", "tool_calls", content=None, reasoning_content="why", tool_calls=[call]
    )
    ask([tmp_path / "in.jsonl"], tmp_path / "out.jsonl", Wire(server.url), Asking("m", system="be brief"))
    sent = server.requests[0]
    assert [m["role"] for m in sent["messages"]] == ["system", "user", "assistant", "tool"]
    assert sent["messages"][2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert sent["messages"][3]["tool_call_id"] == sent["messages"][2]["tool_calls"][0]["id"]
    assert sent["tools"] == [{"type": "function", "function": tool}]
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert isinstance(row, Chat) and row.tools == [tool]
    said = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "why",
        "tool_calls": [{"name": "add", "arguments": {"a": 3}}],
    }
    assert row.messages == [{"role": "system", "content": "be brief"}, *chat[:3], said]


def test_replies_are_read_as_servers_write_them() -> None:
    def read(**message: Any) -> Any:
        return read_answer({"choices": [{"message": message, "finish_reason": "stop"}]})

    assert read(content="a", reasoning="b") == Answered({"role": "assistant", "content": "a", "reasoning_content": "b"})
    assert isinstance(read(content=None), Rejected)
    for broken in ({}, [], {"choices": []}, {"choices": [{}]}, None, {"choices": [{"message": "text"}]}):
        with pytest.raises(ValueError, match="no chat completion"):
            read_answer(broken)
    assert as_request([{"role": "user", "content": "x"}], None) == {"messages": [{"role": "user", "content": "x"}]}


def test_the_command_line_reports_and_refuses(
    groundup: Callable, server: Server, prompts: Path, tmp_path: Path
) -> None:
    common = ("distill", "ask", prompts, "--url", server.url, "--model", "m")
    done = groundup(*common, "--output", tmp_path / "o.jsonl", "--extra", '{"top_k": 3}', "--limit", 2, "--json")
    assert done.code == 0 and done.json()["rows"] == 2 and "ask: 2 of 2 answered" in done.err
    assert server.requests[0]["top_k"] == 3
    assert groundup(*common, "--output", tmp_path / "p.jsonl", "--extra", "[]").code == 2
    refused = groundup(
        "distill", "ask", prompts, "--url", "localhost", "--model", "m", "--output", tmp_path / "q.jsonl"
    )
    assert refused.code == 2 and "no web address" in refused.err
    (tmp_path / "steps.jsonl").write_text('{"prompt": "a", "completions": ["b"], "labels": [true]}\n')
    wrong = groundup(
        "distill", "ask", tmp_path / "steps.jsonl", "--url", server.url, "--model", "m", "--output", tmp_path / "r"
    )
    assert wrong.code == 2 and "steps.jsonl:1" in wrong.err
