"""Shared by all tests: one thread, no network, a small world of files made once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def groundup(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process: groundup("train", "recipe.yaml") -> exit code, stdout, stderr."""
    from groundup.cli import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["groundup", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        assert isinstance(code, int)
        return Result(code, out, err)

    return run


@dataclass(frozen=True)
class Files:
    """A text file, a chat file and a tokenizer trained on them."""

    text: Path
    chat: Path
    tokenizer: Path

    def train(self, stage: str, output: Path, *overrides: str) -> Sequence[str]:
        """Arguments of a training run of seconds."""
        recipe = Path(__file__).parent.parent / "recipes" / f"{stage}.yaml"
        data = self.text if stage == "pretrain" else self.chat
        small = ["train.seq_len=64", "train.batch_size=2", "train.steps=4", "train.threads=1", "train.compile=off"]
        paths = [f"tokenizer={self.tokenizer}", f"data={data}", f"output={output}", f"cache={output.parent / 'cache'}"]
        return ["train", str(recipe), "model=depth-1", *paths, *small, *overrides]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    from groundup.tokenizer import train_tokenizer
    from groundup.world import World

    folder = tmp_path_factory.mktemp("files")
    world = World(seed=0)
    world.write(folder, documents=300, chats=200, later=5)
    train_tokenizer(world.tokenizer_texts(500), vocab_size=512).save(folder / "tokenizer")
    return Files(folder / "pretrain.jsonl", folder / "sft.jsonl", folder / "tokenizer")
