"""The bench of alignment runs, says what it promises and counts right. How fast anything is, is not tested."""

from __future__ import annotations

import json

import pytest

from bench import rl, rl_data
from bench.measure import Program, ProgramFailed
from bench.rl_reward import digits
from groundup.config import build_recipe
from groundup.model.config import ModelConfig
from groundup.model.io import is_scorer, save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import load_tokenizer, train_tokenizer
from groundup.world import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "sft"
    tokenizer = train_tokenizer(World(0).documents(100), 600)
    sizes = dict(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=1024)
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    model = Transformer(ModelConfig(**sizes, **heads, **ids, model_type="llama"))
    model.init_weights(0)
    save_model(model, path)
    tokenizer.save(path)
    return path


def asked(folder, tmp_path, *more):
    work = str(tmp_path / "work")
    return ["--model", str(folder), "--quick", "--threads", "1", "--seq-len", "512", "--work", work, *more]


def options_of(folder, tmp_path, *more):
    [options] = rl.read_options(rl.parse(asked(folder, tmp_path, *more)), tmp_path / "work")
    return options


def test_json_line_has_the_keys(folder, tmp_path, capsys):
    """All three stages run through `groundup.train`, alone."""
    out = tmp_path / "bench.json"
    rl.main(asked(folder, tmp_path, "--peers", "", "--json-out", str(out)))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert len(result["runs"]) == 3 and result["aims"] == {}  # nobody to compare with
    for part in ("grpo", "ppo", "dpo"):
        [(name, figures)] = result[part].items()
        assert name == f"{folder.parent.name}/sft"
        assert figures["samples_per_second"]["ours"] > 0 and figures["memory_mb"]["ours"] > 50
        assert figures["ratio"] is figures["memory_ratio"] is None and figures["missing"] == {}
        share = figures["rollout_share"]["ours"]
        assert share == 0 if part == "dpo" else 0 < share < 1
    assert result["grpo"][name]["tokens_a_sample"]["ours"] == result["ppo"][name]["tokens_a_sample"]["ours"] == 8
    assert result["dpo"][name]["tokens_a_sample"]["ours"] > 16


@pytest.mark.slow
def test_everything_runs_with_trl(folder, tmp_path, capsys):
    pytest.importorskip("trl", reason="the peer")
    rl.main(asked(folder, tmp_path))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for part in ("grpo", "ppo", "dpo"):
        [figures] = result[part].values()
        if part == "ppo" and figures["missing"]:
            assert "bench.peers install trl-ppo" in figures["missing"]["trl"]
            continue
        assert figures["missing"] == {}
        assert figures["samples_per_second"].keys() == figures["memory_mb"].keys() == {"ours", "trl"}
        assert figures["ratio"] > 0 and figures["memory_ratio"] > 0
        ours, theirs = (figures["tokens_a_sample"][name] for name in ("ours", "trl"))
        assert theirs == ours if part != "dpo" else theirs == pytest.approx(ours, rel=0.25)  # other pairs, as many
        assert part == "dpo" or 0 < figures["rollout_share"]["trl"] < 1
    assert len(result["aims"]) >= 3


def test_both_sides_read_the_same_files(folder, tmp_path):
    options = options_of(folder, tmp_path)
    tokenizer = load_tokenizer(folder)
    for part, count in (("grpo", 2), ("ppo", 4)):
        files = rl.make_files(part, options)
        rows = rl_data.read_rows(files["prompts"])
        lengths = [len(tokenizer.render(row["prompt"], None, True).ids) for row in rows]
        assert len(rows) == count and max(lengths) == files["longest"] <= options.longest
        assert rl.program(part, "ours", files, options, {"rows": 4, "seq_len": 512}).spec["recipe"]["data"] == [
            files["prompts"]
        ]
    assert is_scorer(options.folder / "reward")
    pairs = rl.make_files("dpo", options)
    for row in rl_data.read_rows(pairs["pairs"]):
        lengths = [len(tokenizer.render(row["prompt"] + row[side]).ids) for side in ("chosen", "rejected")]
        assert max(lengths) == row["length"] <= options.seq_len // 2  # both fit into a row, so nobody cuts them
    assert pairs["data"] == "the built-in world"


@pytest.mark.parametrize("part", ["grpo", "ppo", "dpo"])
def test_settings_do_not_change_the_work(folder, tmp_path, part):
    """Rows of a step, or answers of a round, are the same in every setting; and every recipe is one."""
    options = options_of(folder, tmp_path, "--pairs", "32", "--prompts", "4", "--group", "8")
    files = rl.make_files(part, options)
    steps = set()
    for setting in rl.possible(part, "ours", options):
        found = build_recipe(rl.recipe(part, setting, files, options) | {"output": str(tmp_path / "run")})
        rl_part = found.rl.at(found.stage)
        answers = found.rl.prompts * (rl_part.group_size or 1)
        steps.add(found.train.batch_size * found.train.accumulate if part == "dpo" else answers)
    assert steps == ({files["rows"]} if part == "dpo" else {32})
    for setting in rl.possible(part, "trl", options):
        assert 32 % min(setting["at_once"], 32) == 0


def test_a_setting_that_makes_unequal_passes_is_left_out(folder, tmp_path):
    options = options_of(folder, tmp_path, "--prompts", "3", "--group", "4")
    sizes = [setting["at_once"] for setting in rl.possible("grpo", "trl", options)]
    assert 8 not in sizes and 2 in sizes and 32 in sizes  # 32: all twelve at once


def test_ppo_without_its_environment_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "python_of", lambda name: None)
    monkeypatch.setattr(Program, "start", started)
    monkeypatch.setattr(Program, "turn", turn)
    monkeypatch.setattr(Program, "stop", lambda self: None)
    found = rl.run("ppo", options_of(folder, tmp_path), lambda text: None)
    assert "bench.peers install trl-ppo" in found["missing"]["trl"] and found["ratio"] is None
    with pytest.raises(ProgramFailed, match="trl-ppo"):
        rl.program("ppo", "trl", {}, options_of(folder, tmp_path), {"at_once": 8, "rollout": 64})


def test_figures_of_turns(folder, tmp_path, monkeypatch):
    """Ratios are those of rounds; a rollout's share is that of the turn; the reward's process counts as memory."""
    monkeypatch.setattr(Program, "start", started)
    monkeypatch.setattr(Program, "turn", turn)
    monkeypatch.setattr(Program, "stop", lambda self: None)
    options = options_of(folder, tmp_path, "--rounds", "2", "--tune")
    found = rl.run("grpo", options, lambda text: None)
    assert found["samples_per_second"] == {"ours": 30.0, "trl": 10.0} and found["ratio"] == 3.0
    assert found["rollout_share"] == {"ours": 0.5, "trl": 0.5}
    assert found["memory_mb"] == {"ours": 70.0, "trl": 100.0} and found["memory_ratio"] == 0.7
    assert found["leanest_ratio"] == 0.7 and len(found["tried"]["trl"]) == len(rl.possible("grpo", "trl", options))
    reached = {name: aim["reached"] for name, aim in rl.aims({"grpo": {"m": found}}).items()}
    assert reached == {"grpo m: times TRL": True, "grpo m: memory over TRL's": True}


def started(self):
    other = {"other_processes_mb": 20.0} if self.name == "ours" else {}
    self.hello = {"first_step": 1.0, "peak_mb": 50.0, "rollout_seconds": 3.0} | other
    return self


def turn(self, ask):
    ours = self.name == "ours"
    told = self.rounds[-1] if self.rounds else self.hello
    figures = {"tokens_per_second": 30.0 if ours else 10.0, "peak_mb": 50.0 if ours else 100.0, "seconds": 2.0}
    more = {"other_processes_mb": 20.0} if ours else {}
    more |= {"rollout_seconds": told["rollout_seconds"] + 1.0, "tokens_a_sample": 8.0}
    self.rounds.append(figures | more)
    return self.rounds[-1]


def test_aims_are_judged_in_their_direction():
    result = {
        "grpo": {"m": {"ratio": 2.9, "memory_ratio": 0.6}},
        "ppo": {"m": {"ratio": 3.1, "memory_ratio": 0.8}},
        "dpo": {"m": {"ratio": 1.5, "memory_ratio": 2.0}, "n": {"ratio": None, "memory_ratio": None}},
    }
    assert [aim["reached"] for aim in rl.aims(result).values()] == [False, True, True, False, True]


def test_digits_reads_text_and_messages():
    assert digits([[], []], ["a1b2", ""]) == [0.5, 0.0]
    assert digits([[]], [[{"role": "assistant", "content": "123x"}]]) == [0.75]


def test_unknown_names_are_refused(capsys):
    for line in (["--only", "gpro"], ["--peers", "verl"]):
        with pytest.raises(SystemExit):
            rl.parse(line)
        assert line[1] in capsys.readouterr().err
