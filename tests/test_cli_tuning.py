"""A model that is there already, from the command line: converted, extended, tuned, merged, asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def test_from_a_pickle_to_a_merged_model(groundup: Callable, files: Any, tmp_path: Path) -> None:
    assert groundup(*files.train("sft", tmp_path / "base")).code == 0
    base = tmp_path / "base"
    for name in ("recipe.yaml", "done.json", "metrics.jsonl"):
        (base / name).unlink(missing_ok=True)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    refused = groundup("eval", base, "--data", files.chat)
    assert refused.code == 2 and "groundup convert" in refused.err
    assert groundup("convert", base, "--output", tmp_path / "model").code == 0
    new = tmp_path / "new.txt"
    new.write_text("Xylophonists quarrel over zugzwang.\n" * 200, encoding="utf-8")
    grown = groundup(
        "tokenizer", "extend", tmp_path / "model", new, "--add", 20, "--output", tmp_path / "grown", "--json"
    )
    assert grown.code == 0, grown.err
    assert grown.json()["added"] == 20
    arguments = files.train("sft", tmp_path / "tuned", "adapt.method=lora", "adapt.rank=2", "optim.lr=1e-2")
    arguments = [a for a in arguments if not a.startswith(("model=", "tokenizer="))]
    tuned = groundup(*arguments, f"model={tmp_path / 'grown'}", "--json")
    assert tuned.code == 0, tuned.err
    assert tuned.json()["trained_parameters"] < tuned.json()["parameters"] / 4
    merged = groundup(
        "merge", tmp_path / "grown", f"{tmp_path / 'tuned'}=0.5", "--output", tmp_path / "merged", "--json"
    )
    assert merged.code == 0 and merged.json()["max_difference"] < 1e-4
    answers = [
        groundup("generate", tmp_path / name, "Who are you?", "--max-tokens", 8, "--json").json()
        for name in ("tuned", "merged")
    ]
    assert all(len(answer["completions"]) == 1 for answer in answers)
    assert not (tmp_path / "tuned" / "model.safetensors").exists()


def test_faults_are_one_line(groundup: Callable, files: Any, tmp_path: Path) -> None:
    for arguments, words in (
        (("merge", tmp_path / "no", tmp_path / "no", "--output", tmp_path / "out"), "no"),
        (("merge", tmp_path, f"{files.tokenizer}=much", "--output", tmp_path / "out"), "is no weight"),
        (("convert", tmp_path / "no.bin", "--output", tmp_path / "out"), "no.bin"),
        (("tokenizer", "extend", tmp_path / "no", files.text, "--output", tmp_path / "out"), "no"),
        (("generate", "Qwen/No-Such-Model", "hi"), "Qwen/No-Such-Model"),
    ):
        said = groundup(*arguments)
        assert said.code == 2 and words in said.err and len(said.err.strip().splitlines()) == 1, said.err
        assert not (tmp_path / "out").exists()
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
