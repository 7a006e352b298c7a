"""`groundup quickstart --full`: every stage after fine-tuning, with a model of two steps; what it reaches is measured
by bench/results.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.results import page
from groundup.eval.report import reached
from groundup.model.config import num_parameters
from groundup.model.cut import smaller
from groundup.model.presets import preset
from groundup.quickstart.figures import SUMS, sums
from groundup.quickstart.full import Tuned
from groundup.quickstart.settings import student
from groundup.world import World

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
    assert "preferred style, more often" in text and "&lt; 10" in text

    plain = groundup(*SHORT, "--output", tmp_path, "--json").json()
    assert plain["stages"] == report["stages"], "without --full, what is there is not taken out of the report"

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    journal = json.loads((tmp_path / "quickstart.json").read_text(encoding="utf-8"))
    del journal["steps"]["dpo"]  # as if it had been killed before that was written down
    (tmp_path / "quickstart.json").write_text(json.dumps(journal), encoding="utf-8")
    done = groundup(*SHORT, "--output", tmp_path, "--full")
    assert "dpo" in done.out and "wanted >= 30 points" in done.out
    again = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [stage["metrics"] for stage in again["stages"]] == [stage["metrics"] for stage in report["stages"]]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == kept, "nothing trained again"

    again["stages"][3]["metrics"]["accuracy"] = None  # a figure that was no number
    table = page([0, 1], [report, again], "COMMAND")
    assert "| grpo | right sums, more | >= 0.2 |" in table and "seconds, seed 1" in table


def test_training_rows_ask_nothing_that_is_held_out(tmp_path: Path) -> None:
    world = World(3)
    tuned = Tuned("", tmp_path, world, seed=3)
    held = {q.messages[-1]["content"] for q in tuned.held}
    held |= {item.messages[-1]["content"] for item in sums(world).items}
    assert len(sums(world).items) == SUMS
    asked = {p.messages[-1]["content"] for _, p in zip(range(8000), tuned.sums(3), strict=False)}
    asked |= {q.messages[-1]["content"] for q in tuned.asked}
    asked |= {pair.prompt[-1]["content"] for pair in world.preferences(2000, 3)}
    assert not held & asked


@pytest.mark.parametrize("depth", [1, 3, 9, 15])
def test_a_student_fits_every_teacher_of_the_quickstart(depth: int, tmp_path: Path) -> None:
    config = preset(f"depth-{depth}", 2190)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()), encoding="utf-8")
    shape = student(str(tmp_path))
    small = smaller(config, **shape)
    assert small.num_attention_heads % small.num_key_value_heads == 0
    if depth >= 3:
        assert num_parameters(small) <= num_parameters(config) / 4 < 1.3 * num_parameters(small)


def test_full_needs_the_world(groundup: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words"}) + "\n", encoding="utf-8")
    done = groundup(*SHORT, "--full", "--data", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert done.code == 2 and "--full" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "aim", "held"),
    [
        (0.9, ">= 0.9", True),
        (261 / 400 - 181 / 400, ">= 0.2", True),
        (-0.03, ">= -0.02", False),
        (0.0, "> 0", False),
        (9, "< 10", True),
        (None, "> 0", False),
    ],
)
def test_aims_are_read_as_they_are_written(value: float | None, aim: str, held: bool) -> None:
    assert reached(value, aim) == held
