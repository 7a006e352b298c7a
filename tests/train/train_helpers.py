"""What the tests of this folder read from a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

TIMINGS = ("tokens_per_second", "share_of_peak")


def weights(output: str | Path) -> dict[str, Tensor]:
    return load_file(Path(output) / "model.safetensors")


def figures(output: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def small_recipe(ground: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """Six steps of a micro model, with these dotted keys changed; output is a folder of `root`."""
    values: dict[str, Any] = {
        "stage": "pretrain", "model": str(ground / "model"), "data": str(ground / "text.jsonl"), "output": "run",
        "cache": str(ground / "cache"),
        "train": {"steps": 6, "seq_len": 32, "batch_size": 4, "save_every": 2, "eval_every": 3, "eval_rows": 8,
                  "threads": 1, "device": "cpu"},
        "optim": {"lr": 3e-3},
        "eval": {"fraction": 0.1},
        "log": {"every": 2, "plots": False},
    }  # fmt: skip
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node[section]
        node[leaf] = value
    values["output"] = str(root / values["output"])
    return values
