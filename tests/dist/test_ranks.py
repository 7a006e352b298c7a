"""Two gloo ranks are one process with twice the rows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groundup.dist import World
from groundup.dist.mesh import rank_and_size
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import train_tokenizer
from groundup.train.run import train

# Trains by each recipe of argv[1] in turn; rank 0 of one with "stop" tells itself to stop at that step.
RANK = """
import json, os, signal, sys
import torch
from groundup.train.run import train

torch.set_num_threads(1)
for recipe, stop in json.loads(sys.argv[1]):
    def hook(line):
        if line["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        train(recipe, peak=1e9, progress=hook)
    except SystemExit as end:
        assert end.code == 143, end.code
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    words = "the cat sat on a mat and saw one red dog run far from home".split()
    turns = [(words[i % 15], " ".join(words[i % 7 : i % 7 + 1 + i % 9])) for i in range(60)]
    rows = [{"conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([" ".join(words)] * 9, 300)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 2, 1, 32, max_position_embeddings=128))
    model.init_weights(0)
    save_model(model, root / "model")
    tokenizer.save(root / "model")
    return root


def recipe(ground: Path, output: str, batch_size: int, **train_keys: Any) -> dict[str, Any]:
    keys = {"steps": 4, "seq_len": 48, "batch_size": batch_size, "eval_every": 2, "eval_rows": 6, "save_every": 2,
            "threads": 1, "device": "cpu", **train_keys}  # fmt: skip
    return {
        "stage": "sft", "model": str(ground / "model"), "data": str(ground / "chat.jsonl"),
        "output": str(ground / output), "cache": str(ground / "cache"), "train": keys, "optim": {"lr": 3e-3},
        "eval": {"fraction": 0.2}, "log": {"every": 1, "plots": False},
    }  # fmt: skip


def torchrun(ranks: int, runs: list[tuple[dict[str, Any], int | None]], script: Path) -> None:
    script.write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1",
               f"--master-port={port}", str(script), json.dumps(runs)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def lines(output: str) -> list[dict[str, float]]:
    text = (Path(output) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two runs' figures and weights agree."""
    first, second = lines(a["output"]), lines(b["output"])
    assert len(first) == len(second) == 6
    for x, y in zip(first, second, strict=True):
        assert (x["step"], x.get("tokens")) == (y["step"], y.get("tokens"))
        for key in ("loss", "grad_norm", "val_loss", "bits_per_byte"):
            if key in x:
                assert x[key] == pytest.approx(y[key], rel=1e-5)
    ours, theirs = (load_file(Path(r["output"]) / "model.safetensors") for r in (a, b))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)


def test_two_ranks_equal_one_process_and_a_run_may_change_their_number(ground: Path) -> None:
    torch.set_num_threads(1)
    one = recipe(ground, "one", 4, accumulate=2)
    two = recipe(ground, "two", 2, accumulate=2)
    fewer = recipe(ground, "fewer", 2, accumulate=2)  # started by two ranks, ended by one
    train(one, peak=1e9)
    torchrun(2, [(two, None), (fewer, 2)], ground / "rank.py")
    before = load_file(ground / "model" / "model.safetensors")
    after = load_file(ground / "one" / "model.safetensors")
    assert max((before[n] - after[n]).abs().max() for n in before) > 1e-3, "nothing was learnt"
    same(one, two)
    assert not (ground / "fewer" / "model.safetensors").exists()
    assert train(fewer, peak=1e9)["steps"] == 4
    same(one, fewer)


def test_a_number_of_ranks_that_cannot_share_the_batch_is_refused(
    ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from groundup.train.loop import Loop

    class Half:
        fingerprint: dict[str, int] = {}  # noqa: RUF012

    loop = Loop.__new__(Loop)
    loop.world, loop.stage, loop.base = World(0, 3), Half(), ""  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"3 ranks cannot share its 4 forward passes a step; start 2 ranks"):
        loop.accept(ground, {"data": {}, "ranks": 2, "accumulate": 2})


def test_alone_the_world_costs_nothing() -> None:
    world = World()
    assert world.main and world.sum([1.5, 2.0]) == [1.5, 2.0]
    assert [t.item() for t in world.gather(torch.tensor(3))] == [3]


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("-1", "1")])
def test_a_broken_environment_is_named(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match="RANK"):
        rank_and_size()
