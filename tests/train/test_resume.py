"""Killed at any instant and started again, a run ends in the same bytes as one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from train_helpers import figures, small_recipe, weights

from groundup.errors import UserError
from groundup.train.run import train

Make = Callable[..., dict[str, Any]]
Run = Callable[..., dict[str, Any]]

# Imports torch once and forks a child for each life of the run. A child is killed at the n-th call of any Python
# function, or at the n-th call of a chosen one: before it, or after it has done its work.
NURSERY = """
import json, os, random, signal, sys, pathlib, shutil
import torch, torch._dynamo  # both take seconds, so the children find them there
from groundup.train import checkpoint, folder, loop, run, start

torch.set_num_threads(1)
recipe, recipes = json.loads(sys.argv[1]), {"pathlib.Path": pathlib.Path, "shutil": shutil, "os": os,
    "checkpoint": checkpoint, "start": start, "RunFolder": folder.RunFolder, "Loop": loop.Loop}

def end(signum):
    os.kill(os.getpid(), signum)

def count_calls(limit):
    calls = [0]
    def seen(frame, event, arg):
        calls[0] += event == "call"
        if calls[0] == limit:
            end(signal.SIGKILL)
    sys.setprofile(seen)
    return calls

def kill_at(place, nth, after, signum):
    owner, name = place.rsplit(".", 1)
    owner, calls = recipes[owner], [0]
    real = getattr(owner, name)
    def wrapped(*args, **options):
        calls[0] += 1
        if calls[0] == nth and not after:
            end(signum)
        out = real(*args, **options)
        if calls[0] == nth and after:
            end(signum)
        return out
    setattr(owner, name, wrapped)

def life(output, arrange):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 0
    try:
        calls = arrange()
        run.train({**recipe, "output": output}, peak=1e9)
        sys.setprofile(None)
        pathlib.Path(output + ".calls").write_text(str(calls[0] if calls else 0))
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    os._exit(code)

root = sys.argv[2]
assert life(root + "/alone", lambda: count_calls(-1)) == 0
total = int(pathlib.Path(root + "/alone.calls").read_text())
"""

LIVES = """
out = {}
dice, out["random"] = random.Random(5), []
for _ in range(10):
    limit = dice.randrange(total // 20, total // 2)
    out["random"].append(life(root + "/random", lambda: count_calls(limit)))

out["chosen"] = []
for place, nth, after in [
    ("Loop.step", 1, True), ("checkpoint.save_file", 2, True), ("checkpoint.save_file", 1, True),
    ("os.fsync", 6, False), ("pathlib.Path.replace", 2, False), ("pathlib.Path.replace", 2, True),
    ("RunFolder.log", 2, True), ("pathlib.Path.rename", 1, True), ("shutil.rmtree", 3, True),
    ("start.save_model", 1, False), ("start.save_model", 1, True), ("RunFolder.finish", 1, False),
]:
    out["chosen"].append(life(root + "/chosen", lambda: kill_at(place, nth, after, signal.SIGKILL)))

out["told"] = [os.waitstatus_to_exitcode(life(root + "/told", lambda: kill_at("Loop.update", 2, True, signum)))
               for signum in (signal.SIGTERM, signal.SIGINT)]

def impatient():
    kill_at("Loop.update", 2, True, signal.SIGINT)
    kill_at("Loop.check", 2, True, signal.SIGINT)

out["twice"] = [os.waitstatus_to_exitcode(life(root + "/twice", impatient)),
                sorted(p.name for p in pathlib.Path(root + "/twice/checkpoints").glob("*"))]
for name in out:
    assert life(root + "/" + name, lambda: None) == 0
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def lives(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run left alone, and others that were killed or told to stop many times: (their folder, how they ended)."""
    root = tmp_path_factory.mktemp("lives")
    changes = {"train.steps": 9, "train.ema": 0.9, "optim.name": "muon", "train.accumulate": 2}
    settings = small_recipe(ground, root, **changes)
    done = subprocess.run(
        [sys.executable, "-c", NURSERY + LIVES, json.dumps(settings), str(root)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["random", "chosen", "told", "twice"])
def test_it_ends_in_the_same_bytes(lives: tuple[Path, dict[str, Any]], name: str) -> None:
    alone, killed = lives[0] / "alone", lives[0] / name
    last = sorted(p.name for p in (alone / "checkpoints").iterdir())[-1]
    files = [f"checkpoints/{last}/{part}.safetensors" for part in ("model", "optimizer", "ema", "rng")]
    for file in ("model.safetensors", *files):
        assert (alone / file).read_bytes() == (killed / file).read_bytes(), file
    assert figures(alone) == figures(killed)
    assert not list((killed / "checkpoints").glob(".*")), "leftovers of a killed write"


def test_it_died_where_it_was_meant_to(lives: tuple[Path, dict[str, Any]]) -> None:
    ends = lives[1]
    assert ends["random"].count(9) >= 5  # later lives have less left to do, and may finish
    assert ends["chosen"] == [9] * 12
    assert ends["told"] == [143, 130]
    assert ends["twice"] == [130, []]  # the second Ctrl-C does not wait for a save


def test_a_damaged_checkpoint_costs_only_its_steps(recipe: Make, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(recipe(output="alone"))
    settings = recipe()
    run(settings)
    output = Path(settings["output"])
    (output / "done.json").unlink()
    (output / "checkpoints" / "step-6" / "model.safetensors").write_bytes(b"half")
    capsys.readouterr()
    run(settings)
    said = capsys.readouterr().err
    assert said.count("step-6: model.safetensors has 4 bytes") == 1 and "going on from step-4" in said
    assert (output / "model.safetensors").read_bytes() == (output.parent / "alone/model.safetensors").read_bytes()
    assert figures(output) == figures(output.parent / "alone")


def test_a_finished_run_says_so_and_does_nothing(recipe: Make, run: Run) -> None:
    settings = recipe()
    first = run(settings)
    before = (Path(settings["output"]) / "model.safetensors").stat().st_mtime_ns
    again = run(settings)
    assert again.pop("already_finished") is True
    assert again == first
    assert (Path(settings["output"]) / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optim.lr", 1e-4, "optim.lr=0.003, not 0.0001"),
        ("seed", 3, "seed=0, not 3"),
        ("data", "other.jsonl", "data[0].path="),
    ],
)
def test_another_recipe_on_the_same_output_is_refused(recipe: Make, run: Run, key: str, value: Any, said: str) -> None:
    settings = recipe()
    run(settings)
    with pytest.raises(UserError) as error:
        run(recipe(**{key: value}))
    assert said in str(error.value) and settings["output"] in str(error.value)
    assert run(recipe(**{"train.save_every": 5, "log.every": 1}))["already_finished"]  # these do not decide the weights


def test_changed_training_files_are_refused(recipe: Make, run: Run, tmp_path: Path, ground: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_bytes((ground / "text.jsonl").read_bytes())
    settings = recipe(data=str(own))
    run(settings)
    (Path(settings["output"]) / "done.json").unlink()
    own.write_bytes(b"".join(own.read_bytes().splitlines(keepends=True)[:100]))
    with pytest.raises(UserError, match="training files have changed"):
        run(settings)


def test_a_folder_with_a_model_of_another_origin_is_not_overwritten(recipe: Make, run: Run, ground: Path) -> None:
    settings = recipe()
    settings["output"] = str(ground / "model")
    before = weights(ground / "model")
    with pytest.raises(UserError, match="holds a model already"):
        run(settings)
    assert before.keys() == weights(ground / "model").keys()


def test_a_recipe_that_cannot_run_claims_no_folder(recipe: Make, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(recipe(data="missing.jsonl"))
    assert run(recipe())["steps"] == 6


def test_a_full_disk_stops_the_run_and_the_next_start_goes_on(
    recipe: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe(output="alone"))
    settings = recipe()
    from groundup.train import checkpoint

    real, written = checkpoint.save_file, []

    def filling(tensors: Any, path: Path) -> None:
        written.append(path)
        if len(written) == 5:
            raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", filling)
    with pytest.raises(UserError, match=r"disk is full.*earlier checkpoints are intact"):
        run(settings)
    monkeypatch.undo()
    assert [p.name for p in (Path(settings["output"]) / "checkpoints").iterdir()] == ["step-2"]
    train(settings, peak=1e9)
    alone = load_file(Path(settings["output"]).parent / "alone" / "model.safetensors")
    assert all((alone[name] == tensor).all() for name, tensor in weights(settings["output"]).items())
