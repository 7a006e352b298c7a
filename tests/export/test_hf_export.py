"""A clean stock folder: shards that transformers loads, nothing of the run, the type that was asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from export_models import FAMILIES, make_model, same_model
from safetensors import safe_open

from groundup.export.run import export
from groundup.model.io import load_model
from groundup.tokenizer import Tokenizer


@pytest.mark.parametrize("family", ["qwen3-untied", "qwen2", "llama-llama3"])
def test_f32_is_bitwise_and_loads_in_transformers(tokenizer: Tokenizer, tmp_path: Path, family: str) -> None:
    folder = make_model(tokenizer, tmp_path / "model", **FAMILIES[family])
    report = export(folder, "hf", None, tmp_path / "out")
    assert report["quant"] == "f32" and report["files"] == ["model.safetensors"]
    assert report["check"]["max_abs_difference"] == 0 and report["check"]["loaded_with"] == "transformers"
    same_model(folder, tmp_path / "out")


def test_a_run_leaves_its_luggage_behind(model_dir: Path, tmp_path: Path) -> None:
    run = shutil.copytree(model_dir, tmp_path / "run")
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "recipe.yaml").write_text("stage: sft\n")
    (run / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": 2}))
    export(run, "hf", "f32", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_shards_and_their_index(model_dir: Path, tmp_path: Path) -> None:
    report = export(model_dir, "hf", "f32", tmp_path / "out", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(report["files"]) > 2 and set(index["weight_map"].values()) == set(report["files"])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    total = 0
    for name in report["files"]:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118  (a safe_open is no dict)
        assert sum(sizes) <= 60_000 or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    same_model(model_dir, tmp_path / "out")


@pytest.mark.parametrize("quant, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision(model_dir: Path, tmp_path: Path, quant: str, dtype: torch.dtype) -> None:
    report = export(model_dir, "hf", quant, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert 0 < report["check"]["kl"] < 0.05
    again = export(tmp_path / "out", "hf", None, tmp_path / "again")
    assert again["quant"] == quant, "the stored type is kept where none is asked for"
    one, two = (load_model(tmp_path / name).state_dict() for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
