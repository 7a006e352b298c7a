"""How does a model learn? THE loop: accumulate, clip, step, log, evaluate, save, resume, stop. No stage has another.

A stage (stage.py) hands out batches and losses as (sum, count). The count of a whole global batch, over accumulation
and ranks, is known before the first forward pass, so every micro-step's sum is divided by it at once: batch 1
accumulated 8 times, batch 8, and 8 ranks of batch 1 are the same step.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from groundup.config import Recipe
from groundup.device import autocast, pick_dtype
from groundup.dist import spread, without_sync
from groundup.errors import UserError
from groundup.optim import build_optimizer, lr_factor
from groundup.train import checkpoint, snapshot
from groundup.train.ema import EMA
from groundup.train.folder import RunFolder
from groundup.train.progress import Progress
from groundup.train.stage import Place, Stage
from groundup.train.stop import Stopped, StopSignals
from groundup.train.track import Trackers

SMALLEST_SCALE = 2.0**-10  # an fp16 loss scale below this has been halved too often for chance


@dataclass
class Sums:
    """Since the last logged line. `values` are the loss and the stage's metrics, summed over `count` tokens."""

    values: dict[str, float] = field(default_factory=dict)
    count: float = 0
    tokens: float = 0
    seconds: float = 0


@dataclass
class State:
    """All that a run remembers beside tensors; goes into a checkpoint as JSON."""

    step: int = 0
    tokens: int = 0
    labels: int = 0  # the trained ones among the tokens
    seconds: float = 0.0  # everything
    step_seconds: float = 0.0  # the optimizer steps alone
    best: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    early: bool = False
    sums: Sums = field(default_factory=Sums)
    logged: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, float] = field(default_factory=dict)


class Loop:
    """One run of one stage over `steps` optimizer steps.

    flops: (tokens, trained tokens) -> floating-point operations, and peak: this device's rate, give `share_of_peak`.
    Everything that the run writes goes through `folder`, by rank 0. rates: of single parameters (build_optimizer).
    base: fingerprint of the frozen weights, which must be the same when the run goes on.
    """

    def __init__(
        self, stage: Stage, model: nn.Module, recipe: Recipe, steps: int, folder: RunFolder, place: Place,
        flops: Callable[[float, float], float] = lambda tokens, labels: 0.0, peak: float = 1.0,
        progress: Progress | None = None, rates: Mapping[str, float] | None = None, base: str = "",
    ) -> None:  # fmt: skip
        self.stage, self.model, self.recipe, self.config = stage, model, recipe, recipe.train
        self.steps, self.folder, self.flops, self.peak, self.base = steps, folder, flops, peak, base
        self.device, self.world = place.device, place.world
        self.progress = progress or Progress(recipe.stage, steps, on=False)
        self.accumulate = self.config.accumulate
        self.dtype = pick_dtype(self.config.dtype, self.device)
        self.state = State()
        self.ema = EMA(model, self.config.ema)
        self.optimizer = build_optimizer(model, recipe.optim, rates)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.forward = spread(_Forward(stage, model), self.world)

    def run(self) -> None:
        """Train to the end, from the newest checkpoint if there is one. Stopped (SystemExit) after a signal."""
        self.resume()
        tenth = max(1, self.steps // 10)
        eval_every, save_every = self.config.eval_every or tenth, self.config.save_every or tenth
        with ExitStack() as stack:
            self.trackers = Trackers(self.recipe, self.folder.path, self.state.step, on=self.world.main)
            stack.callback(self.trackers.close)
            signals = stack.enter_context(StopSignals())
            stack.enter_context(self.progress)
            window, mark = self.fetch(self.state.step), time.perf_counter()
            while not self.finished:
                window, told = self.step(window, signals)
                if self.due(self.recipe.log.every):
                    self.log()
                better = self.due(eval_every) and self.evaluate()
                now = time.perf_counter()
                self.state.seconds, mark = self.state.seconds + now - mark, now
                if self.due(save_every) or better or told:
                    self.save()
                if told and not self.finished:
                    self.progress.say(f"stopped at step {self.state.step}, saved; the same command goes on from there")
                    raise Stopped(signals.signum or signal.SIGTERM)
        if self.state.early:
            self.take_best()

    def result(self) -> dict[str, float]:
        """The figures of the whole run."""
        state = self.state
        loss = {"loss": state.logged["loss"]} if "loss" in state.logged else {}
        told = {name: state.logged.get(name, value) for name, value in self.stage.figures().items()}
        return {**loss, **told, **state.evaluated, **self.speed(state.tokens, state.labels, state.step_seconds)}

    @property
    def finished(self) -> bool:
        return self.state.step >= self.steps or self.state.early

    def due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.finished

    def fetch(self, step: int) -> list[Any]:
        """The batches of one optimizer step."""
        if step >= self.steps:
            return []
        return self.stage.fetch(step, self.accumulate)

    def step(self, window: list[Any], signals: StopSignals) -> tuple[list[Any], bool]:
        """One optimizer step. Returns the next step's batches, and whether some rank was told to stop."""
        began, state = time.perf_counter(), self.state
        counts = [self.stage.count(batch) for batch in window]
        count, tokens = self.world.sum([sum(column) for column in zip(*counts, strict=True)])
        if not count:
            raise UserError(
                f"step {state.step + 1}", "no token of its rows is trained", "look with groundup data inspect"
            )
        self.optimizer.set_lr(lr_factor(state.step, self.steps, self.recipe.optim))
        values, names = self.backward(window, count)
        norm = self.update()
        upcoming = self.fetch(state.step + 1)  # while a GPU still works
        *sums, told = self.world.sum([*values.tolist(), float(signals.signum)])
        self.check(sums[0], float(norm), window)
        state.step, state.tokens, state.labels = state.step + 1, state.tokens + int(tokens), state.labels + int(count)
        state.sums.count, state.sums.tokens = state.sums.count + count, state.sums.tokens + tokens
        for name, value in zip(names, sums, strict=True):
            state.sums.values[name] = state.sums.values.get(name, 0.0) + value
        state.logged["grad_norm"] = float(norm)
        seconds = time.perf_counter() - began
        state.sums.seconds, state.step_seconds = state.sums.seconds + seconds, state.step_seconds + seconds
        self.progress.tick(state.step, seconds, {"loss": sums[0] / count, **self.speed(tokens, count, seconds)})
        return upcoming, told > 0

    def backward(self, window: list[Any], count: float) -> tuple[Tensor, list[str]]:
        """Gradients of loss / count over the window. Returns this rank's sums (loss first) and their names."""
        total = torch.zeros((), device=self.device)
        names = ["loss"]
        for i, batch in enumerate(window):
            with without_sync(self.forward, last=i + 1 == len(window)):
                with autocast(self.device, self.dtype):
                    loss, _, metrics = self.forward(batch.to(self.device, non_blocking=True))
                # DDP averages over ranks, so their number makes it a sum again
                self.scaler.scale(loss * (self.world.size / count)).backward()
            names = ["loss", *metrics]
            total = total + torch.stack([loss.detach(), *metrics.values()])
        return total, names

    def update(self) -> Tensor:
        """Clip and move. Returns the norm of the gradient before clipping; nothing here waits for a GPU."""
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if self.config.max_grad_norm:
            clip_grads_with_norm_(self.trained, self.config.max_grad_norm, norm)
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.state.step + 1)
        return norm

    def check(self, loss: float, norm: float, window: list[Any]) -> None:
        """A loss or gradient that is no number ends the run, before anything of it is saved; the batch is."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.skipped()):
            return
        step, path = self.state.step + 1, self.folder.path / f"bad-batch-rank-{self.world.rank}.safetensors"
        tensors = {f"{i}.{k}": v for i, b in enumerate(window) for k, v in vars(b).items() if isinstance(v, Tensor)}
        save_file(tensors, path)
        raise UserError(
            path, f"step {step} gave loss {loss} with a gradient of norm {norm}; its batch is saved there",
            "try a lower optim.lr or more optim.warmup in another output; the checkpoints before it are intact",
        )  # fmt: skip

    def skipped(self) -> bool:
        """Whether an infinite fp16 gradient is business as usual: the scaler has left the step out and scales less."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= SMALLEST_SCALE

    def log(self) -> None:
        """One line: means since the last one."""
        state, sums = self.state, self.state.sums
        self.write({
            "step": state.step,
            **{name: value / sums.count for name, value in sums.values.items()},
            "lr": self.recipe.optim.lr * lr_factor(state.step - 1, self.steps, self.recipe.optim),
            "grad_norm": state.logged["grad_norm"],
            "tokens": state.tokens,
            **self.stage.figures(),
            **self.speed(sums.tokens, sums.count, sums.seconds),
        })  # fmt: skip
        state.sums = Sums()

    def speed(self, tokens: float, labels: float, seconds: float) -> dict[str, float]:
        """Over all ranks; share_of_peak holds their operations against what their devices reach in matrix products."""
        seconds = max(seconds, 1e-9)
        peak = self.peak * self.world.size
        return {"tokens_per_second": tokens / seconds, "share_of_peak": self.flops(tokens, labels) / seconds / peak}

    def write(self, figures: dict[str, Any]) -> None:
        self.state.logged.update({name: value for name, value in figures.items() if name != "step"})
        if self.world.main:
            self.folder.log(figures)
            self.trackers.log(figures)
        self.progress.log(figures)

    def evaluate(self) -> bool:
        """Held-out figures of the weights that would be saved. True if they are the best so far."""
        self.model.eval()
        with torch.no_grad(), autocast(self.device, self.dtype), self.ema.applied():
            figures = self.stage.evaluate(self.model)
        self.model.train()
        if not figures:
            return False
        state = self.state
        self.write({"step": state.step, **figures})
        better = state.best is None or figures["val_loss"] < state.best
        state.bad_evals = 0 if better else state.bad_evals + 1
        if better:
            state.best, state.best_step = figures["val_loss"], state.step
        if better or not self.config.early_stop:
            state.evaluated = figures
        if self.config.early_stop and state.bad_evals >= self.config.early_stop:
            state.early = True
            self.progress.say(f"no better for {state.bad_evals} evaluations; step {state.best_step} is kept")
        return better

    def save(self) -> None:
        """A checkpoint of this step; older ones go once it is whole."""
        files = snapshot.pack(self.model, self.optimizer, self.ema, self.world, self.stage.state())
        if self.world.main:
            about = {"steps": self.steps, "ranks": self.world.size, "accumulate": self.accumulate,
                     "data": self.stage.fingerprint, "base": self.base, "scaler": self.scaler.state_dict()}  # fmt: skip
            checkpoint.write(self.folder.checkpoints, self.state.step, files, {**asdict(self.state), **about})
            checkpoint.prune(self.folder.checkpoints, self.config.keep_last, self.state.step, self.state.best_step)
        self.world.barrier()

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, or start."""
        self.model.train()
        if self.world.main:
            checkpoint.sweep(self.folder.checkpoints)
        self.world.barrier()
        path = checkpoint.latest(self.folder.checkpoints, self.progress.say)
        if path is not None:
            files, saved = checkpoint.read(path)
            self.accept(path, saved)
            snapshot.unpack(files, self.model, self.optimizer, self.ema, self.world)
            self.stage.restore(snapshot.stage_states(files))
            self.progress.say(f"going on from {path.name} of {self.steps}")
        if self.world.main:
            self.folder.rewind(self.state.step)

    def take_best(self) -> None:
        """After an early stop the best weights are the result."""
        files, _ = checkpoint.read(self.folder.checkpoints / f"step-{self.state.best_step}")
        snapshot.load_weights(files["model"], self.model)
        if self.ema.weights:
            self.ema.load(files["ema"])

    def accept(self, path: Path, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's state, if it belongs to the same data and its batches can be made again."""
        if saved["data"] != self.stage.fingerprint:
            raise UserError(
                path, "the training files have changed since", "choose another output, or restore the files"
            )
        if saved.get("base", "") != self.base:
            raise UserError(
                path, "the base model's weights have changed since", "restore them, or choose another output"
            )
        micro_steps = saved["ranks"] * saved["accumulate"]
        if micro_steps % self.world.size:
            raise UserError(
                path, f"{self.world.size} ranks cannot share its {micro_steps} forward passes a step",
                f"start {saved['ranks']} ranks, or another divisor of {micro_steps}",
            )  # fmt: skip
        if saved["ranks"] != self.world.size:
            self.progress.say(f"{saved['ranks']} ranks before, {self.world.size} now: the same batches, shared anew")
        self.accumulate, self.steps = micro_steps // self.world.size, saved["steps"]
        self.scaler.load_state_dict(saved["scaler"])
        self.state = State(**{name: saved[name] for name in asdict(self.state)} | {"sums": Sums(**saved["sums"])})


class _Forward(nn.Module):
    """The stage's loss as a module: DDP must see the forward pass to synchronise its gradients."""

    def __init__(self, stage: Stage, model: nn.Module) -> None:
        super().__init__()
        self.stage, self.model = stage, model

    def forward(self, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.stage.loss(self.model, batch)
