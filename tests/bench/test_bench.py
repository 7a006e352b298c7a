"""The bench runs, says what it promises, and counts right. How fast anything is, is not tested."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import material, train
from bench.flops import flops_per_token, multiplied_parameters
from bench.measure import Program, ratio
from bench.options import Options
from bench.parts import minutes
from bench.parts.minutes import crossing
from bench.turns import Turns
from groundup.model.config import num_parameters
from groundup.model.presets import PRESETS, preset

SHAPE = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def test_json_line_has_the_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(material, "real", lambda names: [])
    monkeypatch.setattr(material, "WORLD", {"text": 300, "chats": 50})
    line = ["--only", "presets", "--presets", "tiny", "--peers", "", "--rounds", "1", "--seconds", "0.05"]
    small = ["--batch", "2", "--seq-len", "64", "--shape", json.dumps(SHAPE)]
    out = tmp_path / "bench.json"
    train.main([*line, *small, "--work", str(tmp_path / "work"), "--json-out", str(out)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"presets", "ratio_vs_trainer_sft", "minutes_ratio", "runs"} <= result.keys()
    tiny = result["presets"]["tiny"]
    assert {"ratio_vs_packed", "share_of_peak", "memory_ratio"} <= tiny.keys()
    assert tiny["tokens_per_second"]["ours"] > 0
    assert tiny["memory_mb"]["ours"] > 50
    assert 0 < tiny["share_of_peak"] < 1
    assert json.loads(out.read_text()) == result


def test_pieces_merge():
    first = train.merged({}, {"presets": {"tiny": {"ratio_vs_packed": 2.0}}, "runs": [1]})
    both = train.merged(first, {"presets": {"5m": {"ratio_vs_packed": 1.5}}, "minutes_ratio": 0.5, "runs": [2]})
    assert both["presets"].keys() == {"tiny", "5m"}
    assert both["minutes_ratio"] == 0.5
    assert both["ratio_vs_trainer_sft"] is None
    assert both["runs"] == [1, 2]


def test_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.main(["--only", "preset"])
    assert "no part preset" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_multiplied_parameters_are_all_but_a_second_embedding(name):
    config = preset(name)
    assert multiplied_parameters(config.to_hf_dict()) == num_parameters(config)  # tied: the embedding is the head


def test_flops_are_those_that_torch_counts():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = preset("tiny", 400).to_hf_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    rows, seq_len = 2, 48
    ids = torch.randint(0, 400, (rows, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    heads = config["num_attention_heads"] * config["head_dim"] * config["num_hidden_layers"]
    hidden_half = 6 * seq_len * heads * rows * seq_len  # eager attention computes the masked half too
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    ours = (flops_per_token(config, seq_len) - 6 * norms) * rows * seq_len
    assert counter.get_total_flops() - hidden_half == pytest.approx(ours, rel=1e-3)


def test_ratio_is_the_median_over_rounds():
    a, b = Program("a", "", {}), Program("b", "", {})
    a.rounds = [{"tokens_per_second": x} for x in (10.0, 1.0, 30.0)]
    b.rounds = [{"tokens_per_second": x} for x in (5.0, 1.0, 10.0)]
    assert ratio(a, b) == 2.0


def test_crossing_interpolates():
    curve = [(10, 3.0), (20, 2.0), (30, 1.5)]
    assert crossing(curve, 2.5) == pytest.approx(15)
    assert crossing(curve, 1.5) == pytest.approx(30)
    assert crossing(curve, 3.2) == pytest.approx(10)
    assert crossing(curve, 1.0) is None


def test_minutes_hold_ours_against_the_best_rate_and_lengthen_until_reached(tmp_path, monkeypatch):
    best = {1e-3: 2.2, 3e-3: 2.0, 6e-3: 2.1, 1e-2: 2.3}  # bits per byte of the baseline by its learning rate
    steps_asked = []

    def trained(recipe, steps, output, say):
        if recipe["optim"]["name"] == "adamw":
            return {"steps": 100, "bits_per_byte": best[recipe["optim"]["lr"]], "curve": []}
        steps_asked.append(steps)
        last = 2.1 if len(steps_asked) == 1 else 1.9  # too short at first, then good enough
        return {"steps": round(steps), "bits_per_byte": last, "curve": [(20, 2.5), (round(steps), last)]}

    monkeypatch.setattr(minutes, "train", trained)
    monkeypatch.setattr(minutes, "step_seconds", lambda *_: [0.6, 1.2])
    monkeypatch.setattr(minutes, "usual_start", lambda *_: "usual")
    monkeypatch.setattr(material, "real", lambda names: [tmp_path / name for name in names])
    monkeypatch.setattr(material.Material, "tokenizer_dir", lambda *_: tmp_path)
    result = minutes.run(Options(tmp_path, minutes=1, sweep=True), material.Material(tmp_path), print)
    assert steps_asked == pytest.approx([30, 40])  # 0.6 and 0.8 of 60 s, at 1.2 s a step
    assert result["minutes"]["baseline"]["lr"] == 3e-3
    reached = 20 + 20 * (2.5 - 2.0) / (2.5 - 1.9)
    assert result["minutes_ratio"] == pytest.approx(reached * 1.2 / (100 * 0.6))
    assert "of the time" in minutes.show(result).caption


def test_turns_measure_after_the_warm_up_only(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("0\n0\n\n"))
    pipe = io.StringIO()
    turns = Turns(pipe, warmup=2)
    assert [turns.after_step(tokens) for tokens in (7, 7, 3, 5)] == [False, False, False, True]
    ready, first, second = map(json.loads, pipe.getvalue().splitlines())
    assert ready["ready"]
    assert (first["tokens"], first["steps"]) == (3, 1)
    assert (second["tokens"], second["steps"]) == (5, 1)
