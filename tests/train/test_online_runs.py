"""Online DPO: pairs of the own answers, as a reward judges them; learns, goes on after a kill, says what is wrong."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_helpers import rl_recipe, write_ground
from train_helpers import figures, furthest, weights

from groundup.config import build_recipe
from groundup.data.documents import documents
from groundup.dist import World
from groundup.errors import UserError
from groundup.model.io import load_model
from groundup.tokenizer import load_tokenizer
from groundup.train.experience import Experience
from groundup.train.online import Online, best_and_worst
from groundup.train.stage import Place
from groundup.train.start import Start

Run = Callable[..., dict[str, Any]]
CLOCK = "rollout_seconds"


@pytest.fixture(scope="module")
def root(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ground(tmp_path_factory.mktemp("online"), ground)


def online(root: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    told = {"preference": {"online": True}, "rl.minibatches": 1, "rl.prompts": 8, "train.seq_len": 96}
    return rl_recipe(root, folder, "preference", **(told | changes))


def lines(output: str | Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != CLOCK} for line in figures(output)]


@pytest.mark.parametrize("adapt", [{}, {"method": "lora", "rank": 8, "alpha": 64}], ids=["full", "lora"])
def test_answers_become_worth_more(adapt: dict[str, Any], root: Path, tmp_path: Path, run: Run) -> None:
    keys = {"train.steps": 8, "optim.lr": 2e-2, "adapt": adapt, "train.save_every": 8, "train.eval_every": 4}
    result = run(online(root, tmp_path, **keys))
    trained = [line for line in lines(result["output"]) if "loss" in line]
    assert sum(line["reward"] for line in trained[-2:]) / 2 > trained[0]["reward"] + 0.1
    assert trained[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trained[-1]["rewards/margins"] > 0.05 and trained[0]["pairs"] > 0.5 and trained[0]["reward_margin"] > 0
    held = [line for line in lines(result["output"]) if "val_loss" in line]
    assert held[-1]["val_reward"] == pytest.approx(-held[-1]["val_loss"])
    assert (Path(result["output"]) / "samples.jsonl").exists()


def test_pairs_are_the_best_and_the_worst_of_one_prompt(root: Path, tmp_path: Path) -> None:
    recipe = build_recipe(online(root, tmp_path))
    tokenizer = load_tokenizer(recipe.model)
    stage = Online(Online.open(recipe, tokenizer, Path()), recipe, Place(torch.device("cpu"), World()), tokenizer)
    model = stage.prepare(Start(load_model(recipe.model, dtype=torch.float32)))
    window = stage.fetch(0, 1)
    by_ids = {tuple(one.ids): one for one in stage.experiences}
    seen = []
    for batch in window:
        found = [one for row in documents(batch) for one in row]
        _, count, _ = stage.loss(model, batch)
        assert len(found) == 2 * int(count) == 2 * stage.count(batch)[0]
        for good, poor in zip(found[0::2], found[1::2], strict=True):
            better, worse = (by_ids[tuple(one.ids.tolist())] for one in (good, poor))
            group = [one.reward for one in stage.experiences if one.number == better.number]
            assert (better.reward, worse.reward) == (max(group), min(group)) and better.number == worse.number
            assert good.begin == better.start and (good.labels[good.begin - 1 : -1] == good.ids[good.begin :]).all()
            seen.append(better.number)
    assert len(seen) == len(set(seen)) == stage.counts[0] > 4


def said(number: int, reward: float, ids: list[int], trained: bool = True) -> Experience:
    return Experience(number, [1, *ids], 1, False, reward, {"mask": torch.full((len(ids),), float(trained))})


def test_what_makes_no_pair() -> None:
    good, poor, nan = said(0, 2.0, [5]), said(0, 1.0, [6]), said(0, math.nan, [7])
    assert best_and_worst([nan, poor, said(0, 1.5, [8]), good]) == [(good, poor)]
    assert best_and_worst([said(0, 1.0, [5]), said(0, 1.0, [6])]) == [], "worth the same"
    assert best_and_worst([said(0, 1.0, [5]), said(0, 2.0, [5])]) == [], "a judge that contradicts itself"
    assert best_and_worst([good, nan]) == [], "one that was not judged"
    assert best_and_worst([good, said(0, 0.0, [9], trained=False)]) == [], "one that was left out"
    assert best_and_worst([good, said(1, 0.0, [9])]) == [], "of two prompts"


def test_a_round_without_pairs_moves_nothing_and_says_so(
    root: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(online(root, tmp_path, **{"rl.rewards": [f"{root / 'rewards.py'}:same"], "train.steps": 2}))
    assert "no prompt of the round gave two answers of different worth" in caplog.text
    assert furthest(weights(result["output"]), dict(load_model(root / "policy").named_parameters())) == 0
    assert all(line["loss"] == 0 for line in lines(result["output"]) if "loss" in line)


def test_a_step_is_the_same_however_it_is_cut(root: Path, tmp_path: Path, run: Run) -> None:
    found = []
    for size in (1, 8):
        result = run(online(root, tmp_path, **{"train.batch_size": size, "output": f"of{size}", "train.steps": 3}))
        found.append((weights(result["output"]), lines(result["output"])))
    assert furthest(found[0][0], found[1][0]) < 1e-4
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_told_to_stop_and_started_again_it_ends_in_the_same_bytes(root: Path, tmp_path: Path, run: Run) -> None:
    """In the middle of a round that is gone through twice."""
    keys = {"rl.minibatches": 2, "rl.epochs": 2, "train.steps": 8}
    alone = run(online(root, tmp_path, output="alone", **keys))

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 3 and "loss" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = online(root, tmp_path, output="stopped", **keys)
    with pytest.raises(SystemExit):
        run(settings, progress=stop)
    stopped = run(settings)
    both = [Path(result["output"]) for result in (alone, stopped)]
    assert (both[0] / "model.safetensors").read_bytes() == (both[1] / "model.safetensors").read_bytes()
    assert lines(both[0]) == lines(both[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rl.group_size": 1}, "rl.group_size: one answer to a prompt makes no pair"),
        ({"rl.rewards": []}, "rl.rewards"),
        ({"rl.beta": 0.1}, "rl.beta: stage preference does not read it"),
        ({"train.seq_len": 20}, "rows of 20 tokens hold no two answers of rl.max_tokens=10"),
        ({"preference": {"online": True, "loss": "kto"}}, "loss kto is not for online"),
        ({"preference": {"online": True, "reference": "cached"}}, "reference cached is not for online"),
        ({"preference": {"online": True, "reference": "adapter"}}, "no base below it"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    changes: dict[str, Any], words: str, root: Path, tmp_path: Path, run: Run
) -> None:
    with pytest.raises(UserError, match=words) as error:
        run(online(root, tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
