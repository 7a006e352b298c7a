"""What the bench was asked to do, and what every program is asked to use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Settings of a program that change its speed and not what it computes. The first is used; `--tune` tries all of them,
# preset by preset, and keeps the fastest: everybody runs at the best that we find for it, ourselves included.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ours": [
        {"accumulate": 1, "compile": False},
        {"accumulate": 4, "compile": False},
        {"accumulate": 1, "compile": True},
    ],
    "trainer": [
        {"accumulate": 1, "compile": False},
        {"accumulate": 4, "compile": False},
        {"accumulate": 1, "compile": True},
    ],
    "litgpt": [
        {"accumulate": 1, "compile": False, "loss_chunk": 128},
        {"accumulate": 4, "compile": False, "loss_chunk": 128},
        {"accumulate": 1, "compile": False, "loss_chunk": 0},
        {"accumulate": 1, "compile": True, "loss_chunk": 128},
    ],
}
MODULES = {name: f"bench.peers.{name}" for name in SETTINGS}


@dataclass(frozen=True)
class Options:
    """rounds: turns that each program gets. seconds: length of a turn. minutes: the baseline's training time."""

    work: Path
    presets: tuple[str, ...] = ("tiny", "5m", "small-26m")
    peers: tuple[str, ...] = ("trainer", "litgpt")
    rounds: int = 5
    seconds: float = 8.0
    minutes: float = 10.0
    megabytes: int = 200
    seq_len: int = 512
    batch: int = 8
    dtype: str = "fp32"
    device: str = "cpu"
    tune: bool = False
    sweep: bool = False
    shape: Mapping[str, int] = field(default_factory=dict)  # replaces widths of every preset: for smoke tests

    def base(self) -> dict[str, Any]:
        """The part of a program's spec that is alike for all."""
        return {"seq_len": self.seq_len, "batch": self.batch, "dtype": self.dtype, "device": self.device, "warmup": 3}
