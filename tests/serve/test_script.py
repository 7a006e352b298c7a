"""`groundup generate`: where prompts come from, what is printed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from groundup.errors import UserError
from groundup.infer.generate import generate
from groundup.infer.params import SamplingParams
from groundup.serve.terminal import run_generate


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(folder: Path, *prompts: str, **settings) -> dict:
    return run_generate(folder, prompts, max_tokens=4, device="cpu", **settings)


def test_prompts_from_arguments(folder: Path, model, tokenizer, capsys) -> None:
    """Rendered as a chat, answered as generate does, one answer a line."""
    result = run(folder, "The cat", "小猫")
    ids = [
        tokenizer.render([{"role": "user", "content": p}], add_generation_prompt=True).ids for p in ("The cat", "小猫")
    ]
    wanted = generate(model, tokenizer, ids, SamplingParams(max_tokens=4))
    assert [c["text"] for c in result["completions"]] == [c.text for c in wanted]
    assert [c["prompt_tokens"] for c in result["completions"]] == [len(i) for i in ids]
    assert capsys.readouterr().out == "".join(c.text + "\n" for c in wanted)


def test_json_is_one_object(folder: Path, capsys) -> None:
    result = run(folder, "The cat", as_json=True)
    assert json.loads(capsys.readouterr().out) == result
    assert set(result) == {"completions", "seconds", "tokens_per_second"}
    assert result["completions"][0]["prompt"] == "The cat"
    assert result["completions"][0]["tokens"] <= 4


def test_raw_continues_text(folder: Path, model, tokenizer) -> None:
    result = run(folder, "The cat", raw=True)
    assert (
        result["completions"][0]["text"]
        == generate(model, tokenizer, ["The cat"], SamplingParams(max_tokens=4))[0].text
    )


def test_prompts_from_stdin(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert [c["prompt"] for c in run(folder)["completions"]] == ["one", "two"]


def test_prompts_from_files(folder: Path, tmp_path: Path) -> None:
    """Plain lines, prompts, and conversations up to their last answer."""
    lines = tmp_path / "p.txt"
    lines.write_text("one\ntwo\n", encoding="utf-8")
    assert [c["prompt"] for c in run(folder, file=lines)["completions"]] == ["one", "two"]
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert [c["prompt"] for c in run(folder, file=rows)["completions"]] == ["a", "b"]
    talk = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "never seen")]
    messages = [{"role": role, "content": content} for role, content in talk]
    rows.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    assert run(folder, file=rows)["completions"][0]["messages"] == messages[:3]


def test_a_system_text_is_put_first(folder: Path) -> None:
    plain, told = run(folder, "hi"), run(folder, "hi", system="be kind")
    assert told["completions"][0]["prompt_tokens"] > plain["completions"][0]["prompt_tokens"]


def test_faults(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", Tty())
    with pytest.raises(UserError, match="there are none"):
        run(folder)
    with pytest.raises(UserError, match="no such file"):
        run(folder, file=tmp_path / "missing.jsonl")
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl:2"):
        run(folder, file=rows)
    rows.write_text('{"prompt": "a", "completion": "b", "label": true}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl:1: Unpaired rows are no prompts"):
        run(folder, file=rows)
    with pytest.raises(UserError, match=r"prompt 2: .* leave no room"):
        run(folder, "short", "long " * 300)
    rows.write_text('{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}\n')
    with pytest.raises(UserError, match="--raw"):
        run(folder, file=rows, raw=True)
