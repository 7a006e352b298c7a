"""Who else wants the figures? TensorBoard, wandb or swanlab, by setting; no network unless told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groundup.config import Recipe
from groundup.errors import UserError

Figures = dict[str, float]


class Trackers:
    """Sends every logged line after `step` to the trackers that the recipe names."""

    def __init__(self, recipe: Recipe, output: Path, step: int, on: bool = True) -> None:
        starts = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}
        self._open = []
        for name in recipe.log.to if on else []:
            try:
                self._open.append(starts[name](recipe, output, step))
            except ImportError:
                raise UserError("log.to", f"{name} is not installed", f"pip install {name}, or leave it out") from None

    def log(self, figures: dict[str, Any]) -> None:
        step = figures["step"]
        numbers = {k: float(v) for k, v in figures.items() if k != "step" and isinstance(v, (int, float))}
        for send, _ in self._open:
            send(numbers, step)

    def close(self) -> None:
        for _, close in self._open:
            close()


Tracker = tuple[Callable[[Figures, int], Any], Callable[[], Any]]


def _tensorboard(recipe: Recipe, output: Path, step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def send(figures: Figures, step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def _wandb(recipe: Recipe, output: Path, step: int) -> Tracker:
    import wandb

    run = wandb.init(
        project=recipe.log.project, name=output.name, dir=str(output), config=recipe.model_dump(mode="json"),
        mode="online" if recipe.log.online else "offline",
    )  # fmt: skip
    return lambda figures, step: run.log(figures, step=step), run.finish


def _swanlab(recipe: Recipe, output: Path, step: int) -> Tracker:
    os.environ.setdefault("SWANLAB_SAVE_DIR", str(output / "swanlab"))
    import swanlab

    swanlab.init(
        project=recipe.log.project, experiment_name=output.name, config=recipe.model_dump(mode="json"),
        logdir=str(output / "swanlab"), mode="cloud" if recipe.log.online else "local",
    )  # fmt: skip
    return lambda figures, step: swanlab.log(figures, step=step), swanlab.finish
