"""groundup's own training through its public door, `groundup.train`: real data, stage, optimizer and loop."""

from __future__ import annotations

from typing import Any

from bench.peers.recipe import train_by_turns
from bench.turns import Turns, run


def main(spec: dict[str, Any], turns: Turns) -> None:
    recipe = {
        "stage": "pretrain" if spec["rows_kind"] == "packed" else "sft",
        "model": spec["model"],
        "tokenizer": spec["tokenizer"],
        "data": spec["sources"],
        "cache": spec["cache"],
        "train": {
            "batch_size": spec["batch"] // spec["accumulate"],
            "accumulate": spec["accumulate"],
            "seq_len": spec["seq_len"],
            "dtype": spec["dtype"],
            "device": spec["device"],
            "compile": "blocks" if spec["compile"] else "off",
        },
        "optim": {"name": "adamw", "lr": 1e-3},
        "eval": {"fraction": 0.0},
    }
    train_by_turns(recipe, turns)


if __name__ == "__main__":
    run(main)
