"""A chat through a pipe and in a terminal: what is printed, what is kept, what ends it."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from groundup.errors import UserError
from groundup.infer.engine import Engine
from groundup.infer.params import SamplingParams
from groundup.serve.commands import HELP, Leave, run_command
from groundup.serve.conversation import Conversation
from groundup.serve.terminal import Screen, chat_loop, run_chat


class Scripted:
    """Stands for `stream`: answers from a list, and remembers what it was asked. An exception in a list is raised."""

    def __init__(self, *answers: list[str | BaseException], finish_reason: str = "stop") -> None:
        self.answers, self.prompts, self.params = list(answers), [], []
        self.finish_reason = finish_reason

    def __call__(self, engine, prompt_ids, params):
        self.prompts.append(engine.tokenizer.decode(prompt_ids))
        self.params.append(params)
        return _Pieces(self.answers.pop(0), self.finish_reason)


class _Pieces(Iterator):
    def __init__(self, pieces, finish_reason) -> None:
        self.pieces, self.finish_reason, self.completion = iter(pieces), finish_reason, None

    def close(self) -> None:
        """As a Stream has it."""

    def __next__(self) -> str:
        piece = next(self.pieces, None)
        if piece is None:
            self.completion = SimpleNamespace(finish_reason=self.finish_reason)
            raise StopIteration
        if isinstance(piece, BaseException):
            raise piece
        return piece


@pytest.fixture
def talk(model, tokenizer, monkeypatch):
    """Run the chat over lines of stdin with scripted answers: (stdout, stderr, conversation)."""

    def run(lines: str, script: Scripted, tty: bool = False, **settings) -> tuple[str, str, Conversation]:
        monkeypatch.setattr("groundup.infer.generate.stream", script)
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        if tty:
            typed = iter(lines.splitlines())
            monkeypatch.setattr("builtins.input", lambda prompt="": _next(typed))
        chat = Conversation(SamplingParams(max_tokens=20), **settings)
        chat_loop(Engine(model, tokenizer), chat, Screen(out, err, tty))
        return out.getvalue(), err.getvalue(), chat

    return run


def _next(lines: Iterator[str]) -> str:
    try:
        return next(lines)
    except StopIteration:
        raise EOFError from None


def test_a_piped_chat_prints_answers_and_keeps_history(talk) -> None:
    script = Scripted(["Hel", "lo"], ["Yes"])
    out, err, chat = talk("Hi\n\nAgain?\n", script)
    assert (out, err) == ("Hello\nYes\n", "")
    assert [turn["content"] for turn in chat.turns] == ["Hi", "Hello", "Again?", "Yes"]
    assert script.prompts[0].count("<|im_start|>") == 2
    assert "Hello<|im_end|>" in script.prompts[1]


def test_the_real_model_answers(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat\n"))
    out = io.StringIO()
    chat = Conversation(SamplingParams(max_tokens=5))
    chat_loop(Engine(model, tokenizer), chat, Screen(out, io.StringIO(), tty=False))
    assert out.getvalue() == chat.turns[1]["content"] + "\n"


def test_thinking_is_folded_and_kept(talk) -> None:
    script = Scripted(["<th", "ink>\nfirst\n", "then\n</think>", "\n\nfour"], ["ok"])
    out, err, chat = talk("2+2?\n/think\nAnd?\n", script)
    assert out == "four\nok\n"
    assert err == "first\nthen\n"  # what /think shows
    assert chat.turns[1] == {"role": "assistant", "content": "four", "reasoning_content": "first\nthen"}


def test_thinking_on_a_terminal_is_one_dim_line(talk, monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _, _ = talk("2+2?\n", Scripted(["hm</think>\n\n", "four"]), tty=True, thinking=True)
    assert "thinking..." in out
    assert out.index("thinking...") < out.index("\r\x1b[K") < out.index("thought for 2 characters") < out.index("four")
    assert "hm" not in out


def test_thinking_can_be_shown(talk) -> None:
    _, err, _ = talk("/think show\n2+2?\n", Scripted(["<think>\nhm\n</think>\n\nfour"]))
    assert err == "thinking is printed\nhm\n\n"


def test_think_on_and_off_reach_the_prompt(talk) -> None:
    script = Scripted(["a"], ["b"], ["c"])
    talk("/think on\nx\n/think off\ny\n/think auto\nz\n", script)
    assert script.prompts[0].endswith("<think>\n")
    assert script.prompts[1].endswith("<think>\n\n</think>\n\n")
    assert script.prompts[2].endswith("assistant\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(talk) -> None:
    script = Scripted(["one ", "two ", KeyboardInterrupt()], [KeyboardInterrupt()], ["three"])
    out, err, chat = talk("a\nb\nc\n", script)
    assert out == "one two \n\nthree\n"
    assert err.count("(stopped)") == 2
    # what was said is kept; a question without any answer is not
    assert [turn["content"] for turn in chat.turns] == ["a", "one two ", "c", "three"]


def test_ctrl_c_at_the_prompt_says_how_to_leave(talk, monkeypatch) -> None:
    typed = iter([KeyboardInterrupt(), "hi"])

    def read(prompt: str = "") -> str:
        value = next(typed, None)
        if value is None:
            raise EOFError
        if isinstance(value, KeyboardInterrupt):
            raise value
        return value

    monkeypatch.setattr("groundup.infer.generate.stream", Scripted(["hello"]))
    monkeypatch.setattr("builtins.input", read)
    out = io.StringIO()

    tokenizer = SimpleNamespace(render=lambda *a, **k: SimpleNamespace(ids=[1]), decode=lambda ids: "")
    engine = SimpleNamespace(context=99, tokenizer=tokenizer)
    chat_loop(engine, Conversation(SamplingParams()), Screen(out, out, tty=True))  # type: ignore[arg-type]
    assert "/exit leaves" in out.getvalue()
    assert "hello" in out.getvalue()


def test_a_full_context_says_so_and_loses_nothing(talk) -> None:
    script = Scripted(["a" * 10], finish_reason="length")
    _, err, chat = talk("short\n" + "long " * 200 + "\n", script)
    assert "do not fit in the model's context of 160; /undo" in err
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]


def test_an_answer_cut_by_the_context_says_so(talk) -> None:
    script = Scripted(["b"], finish_reason="length")
    words = "x" * 130
    _, err, _ = talk(words + "\n", script)
    assert script.params[0].max_tokens < 20
    assert "context of 160 tokens is full" in err
    _, err, _ = talk("short\n", Scripted(["b"], finish_reason="length"))
    assert "cut at 20 tokens" in err


def test_control_characters_do_not_reach_the_terminal(talk) -> None:
    out, _, chat = talk("hi\n", Scripted(["a\x1b[31mb\x07c\td"]))
    assert out == "a[31mbc\td\n"
    assert chat.turns[1]["content"] == "a\x1b[31mb\x07c\td"


def test_a_line_goes_on_after_a_backslash(talk) -> None:
    script = Scripted(["ok"])
    _, _, chat = talk("one\\\ntwo\n", script)
    assert chat.turns[0]["content"] == "one\ntwo"


def test_commands(tmp_path: Path) -> None:
    chat = Conversation(SamplingParams(), system="be kind")
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}]
    chat.turns = list(turns)
    file = tmp_path / "talk.jsonl"
    run_command(f"/save {file}", chat)
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == [
        {"role": "system", "content": "be kind"},
        *turns,
    ]
    assert run_command("/think", chat) == "hm"
    run_command("/undo", chat)
    assert chat.turns == []
    assert run_command("/undo", chat) == "nothing to take back"
    run_command("/system", chat)
    assert chat.system is None
    run_command(f"/load {file}", chat)
    assert (chat.system, chat.turns) == ("be kind", turns)
    run_command("/reset", chat)
    assert (chat.system, chat.turns) == ("be kind", [])
    run_command("/system speak  Chinese", chat)
    assert chat.system == "speak  Chinese"
    run_command("/temperature 0.5", chat)
    assert chat.params.temperature == 0.5
    with pytest.raises(Leave):
        run_command("/exit", chat)
    said = run_command("/help", chat)
    assert all(line.split()[0] in said for line in HELP)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("/rest", "did you mean /reset"),
        ("/xyzzy", "/help lists them"),
        ("/temperature warm", "wants a number"),
        ("/temperature -1", "out of range"),
        ("/think maybe", "use on, off"),
        ("/save", "wants a file"),
        ("/save /nowhere/at/all", "cannot be written"),
        ("/load /nowhere", "cannot be read"),
    ],
)
def test_a_wrong_command_says_what_is_right_and_changes_nothing(line: str, fault: str) -> None:
    chat = Conversation(SamplingParams(), turns=[{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match=fault):
        run_command(line, chat)
    assert chat == Conversation(SamplingParams(), turns=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"messages": [{"role": "user"}]}', '{"messages": 3}', "\xff"])
def test_a_broken_saved_talk_changes_nothing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_bytes(content.encode("latin-1"))
    chat = Conversation(SamplingParams(), system="s", turns=[{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match="is not a row"):
        chat.load(file)
    assert (chat.system, len(chat.turns)) == ("s", 1)


def test_faults_do_not_end_the_chat(talk) -> None:
    out, err, _ = talk("/rest\n/load nothing\nhi\n/exit\nnever\n", Scripted(["hello"]))
    assert out == "hello\n"
    assert len(err.splitlines()) == 2


def test_run_chat_loads_a_folder(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat\n/temperature 9\n"))
    run_chat(folder, max_tokens=4, device="cpu")
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert "temperature 9" in captured.err
    with pytest.raises(UserError):
        run_chat(folder / "nothing")


def test_on_a_real_terminal(folder: Path) -> None:
    """Prompt, a command, an answer, and Ctrl-D leaves with exit code 0."""
    parent, child = pty.openpty()
    code = f"from groundup.serve.terminal import run_chat; run_chat({str(folder)!r}, max_tokens=3, device='cpu')"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    screen = _read_until(parent, b"> ")
    assert b"/help lists the commands" in screen
    os.write(parent, b"/rest\n")
    assert b"did you mean /reset" in _read_until(parent, b"> ")
    os.write(parent, b"The cat\n")
    assert b"cut at 3 tokens" in _read_until(parent, b"> ")
    os.write(parent, b"\x04")
    assert process.wait(60) == 0
    os.close(parent)


def _read_until(fd: int, mark: bytes) -> bytes:
    """Everything up to a prompt at the end of the output."""
    seen = b""
    while not seen.endswith(mark):
        seen += os.read(fd, 4096)
    return seen
