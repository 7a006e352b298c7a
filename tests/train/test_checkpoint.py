"""Checkpoint files: whole or not there, and damage is seen."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from groundup.errors import UserError
from groundup.train import checkpoint
from groundup.train.folder import RunFolder
from groundup.train.rng import rng_state, seed_all, set_rng_state

FILES = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {"adamw.0.step": torch.tensor(3.0)}}


def write(root: Path, step: int) -> Path:
    files = {**FILES, "model": {"w": FILES["model"]["w"] + step}}
    return checkpoint.write(root, step, files, {"step": step, "best": 0.1})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 4)
    files, state = checkpoint.read(path)
    assert state == {"step": 4, "best": 0.1}
    assert torch.equal(files["model"]["w"], FILES["model"]["w"] + 4)
    assert torch.equal(files["optimizer"]["adamw.0.step"], torch.tensor(3.0))
    assert checkpoint.fault(path) is None
    assert [p.name for p in path.parent.iterdir()] == ["step-4"]


def cut(path: Path) -> None:
    whole = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(whole[: len(whole) // 2])


def flip(path: Path) -> None:
    whole = bytearray((path / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (path / "model.safetensors").write_bytes(bytes(whole))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "has no COMPLETE marker": lambda path: (path / "COMPLETE").unlink(),
    "optimizer.safetensors has": cut,
    "model.safetensors is damaged": flip,
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "marker cannot be read": lambda path: (path / "COMPLETE").write_text("{"),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, said: str) -> None:
    for step in (1, 9, 10):  # 10 comes after 9, not after 1
        write(tmp_path, step)
    warnings: list[str] = []
    assert checkpoint.latest(tmp_path, warnings.append) == tmp_path / "step-10" and not warnings
    DAMAGE[said](tmp_path / "step-10")
    assert checkpoint.latest(tmp_path, warnings.append) == tmp_path / "step-9"
    assert len(warnings) == 1 and str(tmp_path / "step-10") in warnings[0] and said in warnings[0]


def test_no_whole_checkpoint_left_is_an_error(tmp_path: Path) -> None:
    cut(write(tmp_path, 3))
    with pytest.raises(UserError, match="no checkpoint in it is whole"):
        checkpoint.latest(tmp_path, lambda text: None)
    assert checkpoint.latest(tmp_path / "nothing", lambda text: None) is None


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 30):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2, upto=8, best=2)
    assert checkpoint.steps(tmp_path) == [2, 6, 8, 30]  # 30 is ahead of the run: not its own to remove


def test_leftovers_of_killed_writes_are_swept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".step-2.new", ".step-0.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    checkpoint.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"step-2: the disk is full: 1 MB needed, 0 MB free; .*intact"):
        write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("at", ["save_file", "_flush", "_seal"])
def test_a_disk_that_fills_up_while_writing_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    write(tmp_path, 1)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, at, full)
    with pytest.raises(UserError, match="the disk is full"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "step-1"
    write(tmp_path, 2)
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "step-2"


def test_a_full_disk_as_safetensors_reports_it(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(UserError, match="the disk is full"), checkpoint.disk_errors(tmp_path / "step-1", 10):
        full.write_bytes(b"x" * 100)
    error = checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="the disk is full"), checkpoint.disk_errors(tmp_path / "step-1", 10):
        raise error


def test_random_state_survives_a_file(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    seed_all(7)
    draw()  # leaves half a pair of normal numbers in two generators
    path = checkpoint.write(tmp_path, 1, {"rng": rng_state()}, {})
    wanted = draw()
    seed_all(8)
    set_rng_state(load_file(path / "rng.safetensors"))
    assert draw() == wanted


def test_rewinding_the_figures_drops_later_and_broken_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 4, 6):
        folder.log({"step": step, "loss": 1.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    folder.rewind(4)
    assert folder.metrics.read_text() == '{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n'


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(UserError, match="another process is training into it"),
        RunFolder(tmp_path).locked(),
    ):
        pass
    with RunFolder(tmp_path).locked():
        pass
