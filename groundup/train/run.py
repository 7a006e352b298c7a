"""From a recipe to a model folder: what `groundup train` and `groundup.train` do.

Everything that can be wrong with a recipe is found before the first step, and before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from groundup import dist
from groundup.config import Recipe, build_recipe, load_recipe
from groundup.device import CompilePolicy, compile_policy, keep_memory, peak_flops, pick_device, pick_dtype, set_threads
from groundup.dist.mesh import rank_and_size
from groundup.errors import UserError
from groundup.model.flops import Flops
from groundup.plan.memory import check_fits
from groundup.tokenizer import Tokenizer
from groundup.train import checkpoint
from groundup.train.distill import Distill
from groundup.train.folder import RunFolder, cache_folder
from groundup.train.grpo import GRPO
from groundup.train.loop import Loop
from groundup.train.memory import Meter, measured, table
from groundup.train.plots import draw
from groundup.train.ppo import PPO
from groundup.train.preference import Preference
from groundup.train.prepare import compile_blocks, recompute_blocks
from groundup.train.pretrain import Pretrain
from groundup.train.progress import Progress
from groundup.train.reward import Reward
from groundup.train.rng import seed_all
from groundup.train.sft import SFT
from groundup.train.stage import Place, Stage
from groundup.train.start import SOFT_METHODS, Start, config_of, source_of, start, tokenizer_of

STAGES: dict[str, type[Stage]] = {
    "pretrain": Pretrain, "sft": SFT, "reward": Reward, "preference": Preference, "ppo": PPO, "grpo": GRPO,
    "distill": Distill,
}  # fmt: skip
Hook = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe | dict[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    progress: Hook | None = None,
    peak: float | None = None,
) -> dict[str, Any]:
    """Train by a recipe: {name, seconds, tokens, steps, metrics, output, parameters}.

    The same recipe and output again goes on from the last checkpoint; a finished run returns its result, with
    `already_finished`. progress: called with the figures of every logged line. peak: this device's matrix-product rate
    in FLOP/s, measured here if not given. After SIGTERM or Ctrl-C it saves and raises SystemExit (143, 130).
    UserError: whatever is wrong with the recipe, its files, the machine's memory or disk.
    """
    if isinstance(recipe, Recipe):
        recipe = build_recipe(recipe.model_dump(mode="json"), overrides)
    else:
        recipe = build_recipe(recipe, overrides) if isinstance(recipe, dict) else load_recipe(recipe, overrides)
    rank, size = rank_and_size()
    folder = RunFolder(recipe.output)
    with folder.locked(rank == 0):
        folder.check(recipe)
        result = folder.result()
        if result is not None:
            return {**result, "already_finished": True}
        try:
            return _train(recipe, folder, dist.World(rank, size), progress, peak)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
                raise
            fix = (
                "halve train.batch_size and double train.accumulate (the result is the same), or shorten train.seq_len"
            )
            raise UserError("train.batch_size", f"a step does not fit into memory ({error})", fix) from error


def _train(
    recipe: Recipe, folder: RunFolder, world: dist.World, hook: Hook | None, peak: float | None
) -> dict[str, Any]:
    device = _machine(recipe)
    source = source_of(recipe)
    tokenizer = tokenizer_of(recipe, source)
    config = config_of(recipe, source, tokenizer)
    planned = check_fits(config, recipe, device)
    stage_type = STAGES[recipe.stage].of(recipe)
    data = stage_type.open(recipe, tokenizer, Path(recipe.cache or cache_folder() / "tokens"))
    world = dist.start(device)  # only now: tokenising may take longer than ranks wait for each other
    stage = stage_type(data, recipe, Place(device, world), tokenizer)
    seed_all(recipe.seed + world.rank)
    meter = Meter(device)
    begun = start(recipe, config, source, tokenizer, pick_dtype(recipe.train.dtype, device))
    begun.model.to(device)
    model = stage.prepare(begun)
    if world.main:
        checkpoint.check_space(folder.path, _bytes(begun, recipe))
        folder.claim(recipe)
    steps, blocks = stage.steps(), begun.model.blocks
    flops, peak = Flops.of(begun.model, recipe.train.seq_len), peak or peak_flops(str(device), recipe.train.dtype)
    shown = Progress(recipe.stage, steps, on=world.main, hook=hook if world.main else None)
    _describe(shown, recipe, stage, begun, world)
    if recipe.train.activation_checkpointing:
        recompute_blocks(blocks)
    policy = compile_policy(recipe.train.compile, device)
    if recipe.adapt.method in SOFT_METHODS:  # its cache knows its layer by number: each would be compiled apart
        policy = CompilePolicy(False, "a soft prompt stands before every document")
    compile_blocks(blocks, policy)
    shown.say(f"blocks {'compiled' if policy.on else 'not compiled'} ({policy.reason})")
    rates, base = stage.rates(begun), begun.fingerprint
    loop = Loop(stage, model, recipe, steps, folder, stage.place, flops, peak, shown, rates, base)
    meter.begin()
    loop.run()
    found = measured(model, loop.optimizer, loop.ema.weights, meter.total())
    if source is not None:
        for line in table(planned, found):
            shown.say(line)
    return _finish(loop, stage, begun, tokenizer, {"planned": planned, "measured": found})


def _machine(recipe: Recipe) -> torch.device:
    """The device, with threads and memory set, and on a GPU the algorithms that give the same bits each time."""
    device = pick_device(recipe.train.device)
    pick_dtype(recipe.train.dtype, device)
    set_threads(recipe.train.threads)
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, for debugging
    return device


def _bytes(begun: Start, recipe: Recipe) -> int:
    """Disk that a checkpoint and the final weights take: masters, two moments at most, average, result."""
    return begun.numbers() * 4 * (5 if recipe.train.ema else 4)


def _describe(shown: Progress, recipe: Recipe, stage: Stage, begun: Start, world: dist.World) -> None:
    ranks = f", {world.size} ranks" if world.size > 1 else ""
    total, moving = begun.numbers(moving=False), begun.numbers()
    part = f", of which {moving / 1e6:.2f}M move" if moving < total else ""
    device = stage.place.device
    shown.say(f"{recipe.model}: {total / 1e6:.2f}M parameters{part}, on {device}{ranks}; {begun.whose()}")
    data, step = stage.about()
    shown.say(f"data: {data}")
    shown.say(f"{shown.steps} steps of {step}")


def _finish(loop: Loop, stage: Stage, begun: Start, tokenizer: Tokenizer, memory: dict[str, Any]) -> dict[str, Any]:
    """The stock folder at the run's root, the plots, and the mark that the run is done, written last."""
    recipe, folder, state = loop.recipe, loop.folder, loop.state
    result = {
        "name": recipe.stage,
        "seconds": round(state.seconds, 3),
        "tokens": state.tokens,
        "steps": state.step,
        "metrics": loop.result(),
        "output": str(folder.path),
        "parameters": begun.numbers(moving=False),
        "trained_parameters": begun.numbers(),
        "memory": memory,
    }
    if loop.world.main:
        with checkpoint.disk_errors(folder.path, _bytes(begun, recipe)), loop.ema.applied():
            stage.save(begun, folder.path, tokenizer)
        if recipe.log.plots:
            draw(folder.metrics, folder.path / "curves.png", recipe.stage)
        folder.finish(result)
    loop.world.barrier()
    return result
