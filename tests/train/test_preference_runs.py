"""Training on preferences: the same numbers as written out pair by pair, however a step is cut, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_helpers import (
    LORA,
    LOSSES,
    alone,
    make_land,
    mismatch_by_hand,
    moved,
    opened,
    told,
    tuned,
    written_out,
)
from rl_helpers import rl_recipe, write_ground
from safetensors.torch import load_file
from test_resume import NURSERY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_helpers import figures, furthest, weights

from groundup.data.documents import documents
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.io import load_model
from groundup.model.transformer import Transformer
from groundup.train.preference import METRICS
from groundup.train.run import train

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def land(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_land(tmp_path_factory.mktemp("land"), ground)


@pytest.mark.parametrize("name", LOSSES)
def test_packed_pairs_are_pairs_written_out(name: str, land: Path, tmp_path: Path) -> None:
    """Loss and gradients of a step, against conversations run one by one with all their logits."""
    stage, model, _ = opened(tuned(land, tmp_path, told(name)))
    base = None if stage.reference is None else load_model(land / "model", dtype=torch.float32)
    moved(model, -0.02 if name == "kto" else 0.02)  # the way in which answers to other questions become likelier
    window = stage.fetch(0, 2)
    kl = 0.0
    if name == "kto":
        assert base is not None
        with torch.no_grad():
            ratios = [alone(model, one) - alone(base, one) for one in mismatch_by_hand(window, 128)]
        kl = max(0.0, torch.stack(ratios).mean().item())
        assert window[0].baseline == pytest.approx(kl, rel=1e-4) and kl > 0.01
    total, count = torch.zeros(()), 0
    for batch in window:
        loss, number, metrics = stage.loss(model, batch)
        total, count = total + loss, count + int(number)
        assert stage.count(batch)[0] == number and metrics.keys() >= set(METRICS)
    total.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    plain = sum(written_out(model, base, batch, told(name), kl) for batch in window)
    assert count == sum(len(row) for batch in window for row in documents(batch)) / (
        1 if window[0].wanted_D is not None else 2
    )
    assert total.item() == pytest.approx(plain.item(), rel=1e-4)
    plain.backward()
    largest = max(g.abs().max().item() for g in ours.values())
    assert largest > 1e-3
    for n, p in model.named_parameters():
        torch.testing.assert_close(ours[n], p.grad, rtol=1e-3, atol=1e-4 * max(largest, 1.0), msg=n)


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_a_step_is_the_same_however_it_is_cut(name: str, land: Path, tmp_path: Path, run: Run) -> None:
    """(batch 1, accumulate 8) == (8, 1): a loss is divided by the pairs of its step, KTO's baseline is of all of it."""
    runs = []
    for batch_size, accumulate in ((8, 1), (1, 8), (2, 4)):
        shape = {"train.batch_size": batch_size, "train.accumulate": accumulate, "train.steps": 3, "log.every": 1}
        settings = tuned(land, tmp_path, told(name), output=f"{name}{batch_size}", **shape)
        run(settings)
        runs.append((weights(settings["output"]), figures(settings["output"])))
    first, before = runs[0], load_file(land / "model" / "model.safetensors")
    assert furthest(first[0], before) > 1e-3, "nothing was learnt"
    for found, lines in runs[1:]:
        assert furthest(first[0], found) < 2e-5
        for ours, theirs in zip(first[1], lines, strict=True):
            assert ours.keys() == theirs.keys()
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // 4 for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


def test_no_tensor_of_tokens_times_vocabulary(land: Path, tmp_path: Path) -> None:
    stage, _, _ = opened(tuned(land, tmp_path, {}, **{"train.seq_len": 192, "train.batch_size": 12}))
    wide = Transformer(ModelConfig(8000, 32, 64, 2, 2, 1, 32, max_position_embeddings=256))
    wide.init_weights(0)
    (batch,) = stage.fetch(0, 1)
    batch.labels_BT = batch.input_ids_BT.roll(-1, 1)  # every token is trained: the most that a head can be asked
    with Largest() as largest:
        loss, _, _ = stage.loss(wide, batch)
        loss.backward()
    tokens = batch.labels_BT.numel()
    assert tokens == 12 * 192 and largest.numbers < tokens * 8000 / 3
    assert largest.numbers >= 8000 * 256, "a chunk of logits was seen, so that larger ones would have been"


def test_preferences_are_learnt_and_told(land: Path, tmp_path: Path, run: Run) -> None:
    for name, floor in (("dpo", 0.95), ("kto", 0.9), ("simpo", 0.95)):
        more = {"train.steps": 25, "train.eval_every": 5, "log.every": 5, "train.batch_size": 8, "optim.lr": 1e-2}
        settings = tuned(land, tmp_path, told(name), output=name, **more)
        result = run(settings)
        lines = figures(settings["output"])
        held = [line for line in lines if "val_loss" in line]
        assert held[-1]["val_rewards/accuracies"] >= floor > held[0]["val_rewards/accuracies"] - 1
        assert held[-1]["val_loss"] < held[0]["val_loss"]
        assert held[-1]["val_rewards/margins"] > 0.3
        trained = [line for line in lines if "loss" in line]
        assert all(line.keys() >= {"loss", *METRICS} for line in trained)
        assert trained[-1]["logps/rejected"] < trained[0]["logps/rejected"]
        assert trained[-1]["rewards/margins"] == pytest.approx(
            trained[-1]["rewards/chosen"] - trained[-1]["rewards/rejected"], abs=1e-4
        )
        assert result["metrics"]["val_loss"] == held[-1]["val_loss"]
    assert all(line["kl"] >= 0 for line in figures(tmp_path / "kto") if "kl" in line)


def test_means_of_one_side_are_over_that_side(land: Path, tmp_path: Path) -> None:
    stage, model, _ = opened(tuned(land, tmp_path, told("kto")))
    moved(model, 0.02)
    window = stage.fetch(0, 3)
    sums, count = dict.fromkeys(stage.names, 0.0), 0
    chosen, rejected = [], []
    for batch in window:
        _, number, metrics = stage.loss(model, batch)
        count += int(number)
        sums = {name: sums[name] + float(metrics[name]) for name in sums}
        rewards = 0.1 * stage.answers(model, batch).ratios.detach()
        chosen += rewards[batch.wanted_D].tolist()
        rejected += rewards[~batch.wanted_D].tolist()
    assert len(chosen) != len(rejected), "the test needs unequal sides"
    assert sums["rewards/chosen"] / count == pytest.approx(np.mean(chosen), rel=1e-4)
    assert sums["rewards/rejected"] / count == pytest.approx(np.mean(rejected), rel=1e-4)
    assert sums["kl"] / count == pytest.approx(window[0].baseline)


LIVES = """
dice, ends = random.Random(4), []
for _ in range(3):
    limit = dice.randrange(total // 20, total // 2)
    ends.append(life(root + "/killed", lambda: count_calls(limit)))
assert life(root + "/killed", lambda: None) == 0
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_bytes(land: Path, tmp_path: Path) -> None:
    """Of all losses KTO's asks most of a step that is made again: its baseline comes from the weights before it."""
    settings = tuned(land, tmp_path, told("kto"), adapt=LORA, **{"train.accumulate": 2})
    done = subprocess.run(
        [sys.executable, "-c", NURSERY + LIVES, json.dumps(settings), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 9 in json.loads(done.stdout.splitlines()[-1])  # SIGKILL took some of them
    both = [(tmp_path / life / "adapter_model.safetensors").read_bytes() for life in ("alone", "killed")]
    assert both[0] == both[1] and figures(tmp_path / "alone") == figures(tmp_path / "killed")


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_told_to_stop_and_started_again_it_ends_in_the_same_bytes(
    name: str, land: Path, tmp_path: Path, run: Run
) -> None:
    shape = {"train.accumulate": 2, "log.every": 1}
    alone_of = tuned(land, tmp_path, told(name), output="alone", **shape)
    run(alone_of)

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = tuned(land, tmp_path, told(name), **shape)
    with pytest.raises(SystemExit):
        run(settings, progress=stop)
    run(settings)
    both = [Path(one["output"]) for one in (alone_of, settings)]
    assert (both[0] / "model.safetensors").read_bytes() == (both[1] / "model.safetensors").read_bytes()
    assert figures(both[0]) == figures(both[1])


RANK = """
import json, sys
import torch
from groundup.train.run import train

torch.set_num_threads(1)
for recipe in json.loads(sys.argv[1]):
    train(recipe, peak=1e9)
"""


def of_ranks(ranks: int, land: Path, root: Path) -> list[dict[str, Any]]:
    shape = {"train.accumulate": 2, "train.steps": 3, "log.every": 1, "train.batch_size": 4 // ranks}
    shape |= {"cache": str(root / f"cache{ranks}")}
    runs = [
        tuned(land, root, preference, output=f"{name}{ranks}", **shape)
        for name, preference in (("dpo", {}), ("kto", told("kto")), ("cached", {"reference": "cached"}))
    ]
    keys = {"rl.minibatches": 1, "train.seq_len": 96, "output": f"online{ranks}"}
    return [*runs, rl_recipe(root, root, "preference", preference={"online": True}, **keys)]


def test_two_ranks_are_one(land: Path, ground: Path, tmp_path: Path, run: Run) -> None:
    write_ground(tmp_path, ground)
    runs = list(zip(of_ranks(1, land, tmp_path), of_ranks(2, land, tmp_path), strict=True))
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
               f"--master-port={port}", str(script), json.dumps([two for _, two in runs])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for one, two in runs:
        run(one)
        assert furthest(weights(one["output"]), weights(two["output"])) < 5e-5, one["output"]
        for ours, theirs in zip(figures(one["output"]), figures(two["output"]), strict=True):
            ours, theirs = ({k: v for k, v in line.items() if k != "rollout_seconds"} for line in (ours, theirs))
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("preference", "changes", "said"),
    [
        ({"reference": "adapter"}, {}, "no base below it"),
        ({"reference": "cached"}, {"model": "tiny"}, "the preset tiny has no weights yet"),
        ({}, {"adapt": LORA | {"dropout": 0.1}}, "adapt.dropout: the policy would differ from its reference by chance"),
        ({}, {"rl": {"prompts": 3}}, "rl: is read where pairs are sampled"),
        ({"loss": "simpo", "reference": "copy"}, {}, "loss simpo has no reference"),
        ({"loss": "kto", "reference": "cached"}, {}, "use reference copy or adapter"),
        ({"loss": "apo_zero", "reference": "none"}, {}, "loss apo_zero compares with a reference"),
        (
            {"loss": "hinge", "label_smoothing": 0.1},
            {},
            r"loss hinge does not read label_smoothing \(dpo, robust, simpo do\)",
        ),
        ({"loss": "orpo", "sft_weight": 1.0}, {}, "orpo has the chosen answers' cross entropy already"),
        ({"loss": "sigmoid"}, {}, "preference.loss: Input should be 'dpo'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    preference: dict[str, Any], changes: dict[str, Any], said: str, land: Path, tmp_path: Path, run: Run
) -> None:
    with pytest.raises(UserError, match=said) as error:
        run(tuned(land, tmp_path, preference, tokenizer=str(land / "model"), **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_rows_of_another_kind_are_named(land: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"judged.jsonl:1: a row of kind Unpaired where a pair of answers is needed"):
        run(tuned(land, tmp_path, {}, data=str(land / "judged.jsonl")))
    assert (
        run(tuned(land, tmp_path, told("kto"), data=str(land / "pairs.jsonl")))["steps"] == 6
    )  # a pair is two answers


def test_kto_needs_two_answers_a_step_and_tells_of_unbalanced_ones(
    land: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (land / "judged.jsonl").read_text().splitlines(keepends=True)
    one = tmp_path / "one.jsonl"
    one.write_text(lines[0])
    with pytest.raises(UserError, match="a step of one answer has no other question"):
        run(tuned(land, tmp_path, told("kto"), data=str(one), **{"train.batch_size": 1, "eval.fraction": 0.0}))
    many = tmp_path / "many.jsonl"
    many.write_text("".join(lines[1::2] + lines[:8:2]))
    caplog.clear()
    opened(tuned(land, tmp_path, {"loss": "kto"}, data=str(many), **{"eval.fraction": 0.0}))
    assert "4 wanted answers, 48 unwanted: use preference.desirable_weight=12" in caplog.text


@pytest.mark.parametrize("name", ["dpo", "dpo-lora", "simpo", "orpo", "kto", "dpo-online"])
def test_the_recipes_run_as_they_are_called(name: str, land: Path, ground: Path, tmp_path: Path) -> None:
    given = [f"model={land / 'model'}", f"output={tmp_path / 'o'}", f"cache={ground / 'cache'}", "train.threads=1"]
    given += ["train.steps=2", "train.seq_len=128", "train.batch_size=2", "train.device=cpu", "log.plots=false"]
    if name == "dpo-online":
        write_ground(tmp_path, ground)
        given += [f"data={tmp_path / 'prompts.jsonl'}", "rl.prompts=2", "rl.max_tokens=8", "train.eval_rows=2"]
    else:
        given += [f"data={land / ('judged.jsonl' if name == 'kto' else 'pairs.jsonl')}"]
    result = train(Path(__file__).parents[2] / "recipes" / f"{name}.yaml", given, peak=1e9)
    assert (result["name"], result["steps"]) == ("preference", 2)
    assert (tmp_path / "o" / f"{'adapter_' * (name == 'dpo-lora')}model.safetensors").exists()
