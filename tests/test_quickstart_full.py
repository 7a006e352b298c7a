"""`groundup quickstart --full`: every stage after fine-tuning, with a model of two steps; what it reaches is measured
by bench/results.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.results import holds, page

FIGURES = {
    "reward": ["accuracy", "longer_baseline"],
    "dpo": ["preferred_rate_gain", "world_exact_change"],
    "ppo": ["reward_gain_sd", "kl"],
    "grpo": ["arithmetic_gain", "format_rate"],
    "distill": ["accuracy_kept", "gain_over_no_teacher"],
    "majority": ["gain"],
}
SHORT = ("quickstart", "--minutes", 0.02, "--depth", 1)


def test_full_goes_on_after_a_finished_demo_and_writes_a_row_a_stage(groundup: Callable, tmp_path: Path) -> None:
    first = groundup(*SHORT, "--output", tmp_path, "--json").json()
    assert [stage["name"] for stage in first["stages"]] == ["tokenizer", "pretrain", "sft"]
    trained = (tmp_path / "sft" / "model.safetensors").read_bytes()

    report = groundup(*SHORT, "--output", tmp_path, "--full", "--json").json()
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert list(stages)[3:] == list(FIGURES)
    for name, keys in FIGURES.items():
        assert all(isinstance(stages[name]["metrics"][key], float) for key in keys), stages[name]
        assert set(stages[name]["wanted"]) <= set(stages[name]["metrics"])
    assert (tmp_path / "sft" / "model.safetensors").read_bytes() == trained
    assert stages["distill"]["parameters"] < stages["dpo"]["parameters"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "preferred rate gain" in text and "under 10 nats a reply" in text

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = groundup(*SHORT, "--output", tmp_path, "--full", "--json").json()
    assert again["stages"] == report["stages"], "what is done is not done again"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == kept

    table = page([0, 1], [report, again], "COMMAND")
    assert "| grpo | arithmetic gain | at least 0.2 |" in table and "seconds, seed 1" in table


def test_full_needs_the_world(groundup: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words"}) + "\n", encoding="utf-8")
    done = groundup(*SHORT, "--full", "--data", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert done.code == 2 and "--full" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "aim", "held"),
    [(0.9, "at least 0.9", True), (-0.03, "at least -0.02", False), (0.0, "over 0", False), (9, "under 10 nats", True)],
)
def test_aims_are_read_as_they_are_written(value: float, aim: str, held: bool) -> None:
    assert holds(value, aim) == held
