"""What a person types, and what a program reads back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def test_help_names_every_command(groundup: Callable) -> None:
    shown = groundup("--help")
    assert shown.code == 0
    for command in ("quickstart", "train", "chat", "generate", "eval", "world", "plan", "tokenizer", "data"):
        assert command in shown.out


def test_a_mistyped_command_is_answered_with_the_right_one(groundup: Callable) -> None:
    wrong = groundup("trian")
    assert wrong.code == 2
    assert "train" in wrong.err
    assert "Traceback" not in wrong.err


def test_inspect_and_clean_as_json(groundup: Callable, files: Any, tmp_path: Path) -> None:
    report = groundup("data", "inspect", files.chat, "--tokenizer", files.tokenizer, "--json").json()
    assert report["format"] == "minimind"
    assert (report["rows"], report["bad_rows"]) == (200, 0)
    assert report["tokens"] > 1000
    twice = tmp_path / "twice.jsonl"
    twice.write_text(files.text.read_text(encoding="utf-8") * 2, encoding="utf-8")
    cleaned = groundup("data", "clean", twice, "--output", tmp_path / "clean.jsonl", "--near-threshold", 0, "--json")
    assert cleaned.code == 0
    kept = (tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == len(set(files.text.read_text(encoding="utf-8").splitlines()))
    assert cleaned.json()


def test_from_files_to_answers_as_json(groundup: Callable, files: Any, tmp_path: Path) -> None:
    made = groundup(
        "tokenizer", "train", files.text, "--vocab-size", 512, "--output", tmp_path / "tok", "--json"
    ).json()
    assert made["vocab_size"] == 512
    assert made["languages"]["zh"]["chars_per_token"] > 0
    needs = groundup("plan", *files.train("pretrain", tmp_path / "base")[1:], "--json").json()
    assert needs
    base = groundup(*files.train("pretrain", tmp_path / "base"), "--json").json()
    assert base["steps"] == 4
    chat = groundup(*files.train("sft", tmp_path / "chat", f"model={tmp_path / 'base'}"), "--json").json()
    assert chat["metrics"]["bits_per_byte"] > 0
    answers = groundup("generate", tmp_path / "chat", "hi", "--max-tokens", 4, "--json")
    assert answers.code == 0
    measured = groundup("eval", tmp_path / "chat", "--data", files.text, "--json").json()
    assert measured["files"][0]["bits_per_byte"] > 0


def test_our_model_is_a_stock_folder(groundup: Callable, files: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import groundup as package

    assert groundup(*files.train("pretrain", tmp_path / "run")).code == 0
    tokenizer, stock = (
        AutoTokenizer.from_pretrained(tmp_path / "run"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "run"),
    )
    ids = torch.tensor([tokenizer("Ella lives in Oakham. 艾玛住在橡树镇。")["input_ids"]])
    with torch.no_grad():
        assert (package.load_model(tmp_path / "run")(ids) - stock(ids).logits).abs().max() < 1e-4
    assert package.load_tokenizer(tmp_path / "run").encode("艾玛") == tokenizer("艾玛")["input_ids"]


def test_quickstart_goes_on_where_it_was(groundup: Callable, tmp_path: Path) -> None:
    """Killed after its tokenizer, it ends in the same bytes as one that was not."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    first = groundup("quickstart", "--minutes", 0.01, "--depth", 1, "--output", whole, "--json")
    assert first.code == 0, first.err
    report = first.json()
    assert [stage["name"] for stage in report["stages"]] == ["tokenizer", "pretrain", "sft"]
    assert {"world_exact_zh", "world_exact_en", "bits_per_byte"} <= set(report["stages"][-1]["metrics"])
    assert report == json.loads((whole / "report.json").read_text(encoding="utf-8"))
    for name in ("tokenizer/tokenizer.json", "pretrain/model.safetensors", "sft/config.json", "report.md"):
        assert (whole / name).is_file()

    again.mkdir()
    journal = json.loads((whole / "quickstart.json").read_text(encoding="utf-8"))
    journal["steps"] = {name: journal["steps"][name] for name in ("look at the machine", "plan")}
    journal["steps"]["tokenizer"] = {"seconds": 0, "tokens": 1, "metrics": {}}
    (again / "quickstart.json").write_text(json.dumps(journal), encoding="utf-8")
    (whole / "tokenizer").rename(again / "tokenizer")
    assert groundup("quickstart", "--minutes", 0.01, "--depth", 1, "--output", again).code == 0
    # the recipes name their folders, the weights do not
    for stage in ("pretrain", "sft"):
        ours, theirs = ((folder / stage / "model.safetensors").read_bytes() for folder in (whole, again))
        assert ours == theirs


def test_the_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['groundup', '--help']\nfrom groundup.cli import main\nimport atexit\n"
    code += "atexit.register(lambda: print('torch' in sys.modules))\nmain()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert out.strip().splitlines()[-1] == "False"
