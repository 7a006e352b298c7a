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
