"""Any recipe of groundup, trained by turns: the hook is called with every logged line, here every step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from bench.turns import Turns, run
from groundup.train.run import train

NEVER = 10**6  # steps: the bench ends the run


class Finished(Exception):
    """The bench wants no more steps."""


class TakeTurns:
    """Reports the real tokens of each step (filler at the ends of rows is none)."""

    def __init__(self, turns: Turns, positions: int) -> None:
        self.turns, self.positions, self.seen = turns, positions, 0

    def __call__(self, figures: dict[str, Any]) -> None:
        tokens = figures["tokens"] - self.seen
        self.seen += tokens
        self.turns.extra = {"useful_share": self.seen / (figures["step"] * self.positions)}
        if self.turns.after_step(tokens):
            raise Finished


def train_by_turns(recipe: dict[str, Any], turns: Turns, hook: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Train without evaluating or saving until the bench has seen enough. hook: instead of TakeTurns."""
    length = recipe["train"]
    positions = length["batch_size"] * length.get("accumulate", 1) * length["seq_len"]
    endless = {"steps": NEVER, "save_every": 2 * NEVER, "eval_every": 2 * NEVER}
    with tempfile.TemporaryDirectory() as folder:
        own = {"output": f"{folder}/run", "train": length | endless, "log": {"every": 1, "plots": False}}
        try:
            train(recipe | own, progress=hook or TakeTurns(turns, positions), peak=1.0)
        except Finished:
            return


def main(spec: dict[str, Any], turns: Turns) -> None:
    train_by_turns(spec["recipe"], turns)


if __name__ == "__main__":
    run(main)
