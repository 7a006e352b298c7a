"""From a recipe to a model folder: what `groundup train` and `groundup.train` do.

Everything that can be wrong with a recipe is found before the first step, and before anything is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from groundup import dist
from groundup.config import Recipe, build_recipe, load_recipe
from groundup.device import compile_policy, keep_memory, peak_flops, pick_device, pick_dtype, set_threads
from groundup.dist.mesh import rank_and_size
from groundup.errors import UserError
from groundup.model.config import ModelConfig, num_parameters
from groundup.model.flops import Flops
from groundup.model.io import load_model, save_model
from groundup.model.presets import preset
from groundup.model.transformer import Transformer
from groundup.plan.memory import check_fits
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.train import checkpoint
from groundup.train.folder import RunFolder, cache_folder
from groundup.train.loop import Loop
from groundup.train.plots import draw
from groundup.train.prepare import compile_blocks, recompute_blocks
from groundup.train.pretrain import Pretrain
from groundup.train.progress import Progress
from groundup.train.rng import seed_all
from groundup.train.sft import SFT
from groundup.train.stage import Place, TokenStage

STAGES: dict[str, type[TokenStage]] = {"pretrain": Pretrain, "sft": SFT}
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
    tokenizer = _tokenizer(recipe)
    config = _model_config(recipe, tokenizer)
    check_fits(config, recipe, device)
    stage_type = STAGES[recipe.stage]
    data = stage_type.open(recipe, tokenizer, Path(recipe.cache or cache_folder() / "tokens"))
    world = dist.start(device)  # only now: tokenising may take longer than ranks wait for each other
    stage = stage_type(*data, recipe, Place(device, world))
    seed_all(recipe.seed + world.rank)
    model = _model(recipe, config).to(device)
    if world.main:
        checkpoint.check_space(folder.path, _bytes(model, recipe))
        folder.claim(recipe)
    steps = _steps(recipe, stage, world)
    flops, peak = Flops(config, recipe.train.seq_len), peak or peak_flops(str(device), recipe.train.dtype)
    shown = Progress(recipe.stage, steps, on=world.main, hook=hook if world.main else None)
    _describe(shown, recipe, stage, config, world)
    if recipe.train.activation_checkpointing:
        recompute_blocks(model.blocks)
    policy = compile_policy(recipe.train.compile, device)
    compile_blocks(model.blocks, policy)
    shown.say(f"blocks {'compiled' if policy.on else 'not compiled'} ({policy.reason})")
    loop = Loop(stage, model, recipe, steps, folder, stage.place, flops, peak, shown)
    loop.run()
    return _finish(loop, model, tokenizer, config)


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


def _tokenizer(recipe: Recipe) -> Tokenizer:
    if recipe.tokenizer is None and not Path(recipe.model).is_dir():
        preset(recipe.model)  # an unknown name is what to say first
        fix = "give tokenizer=DIR; make one with groundup tokenizer train FILES --output DIR"
        raise UserError("tokenizer", f"is missing, and the preset {recipe.model} has none of its own", fix)
    return load_tokenizer(recipe.tokenizer or recipe.model)


def _model_config(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    """The model's shape, which must have room for the tokenizer's ids and the recipe's rows."""
    local = Path(recipe.model).is_dir()
    config = ModelConfig.from_dir(recipe.model) if local else preset(recipe.model, tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer={recipe.tokenizer}", f"has {tokenizer.vocab_size} tokens, the model {config.vocab_size}",
            "use the tokenizer that the model was trained with",
        )  # fmt: skip
    if recipe.train.seq_len > config.max_position_embeddings:
        raise UserError(
            "train.seq_len", f"{recipe.train.seq_len} exceeds the model's {config.max_position_embeddings} positions",
            f"use train.seq_len={config.max_position_embeddings} or less",
        )  # fmt: skip
    if local:
        return config
    return replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)


def _model(recipe: Recipe, config: ModelConfig) -> Transformer:
    """The folder's weights or fresh ones from the seed, as fp32 masters."""
    if Path(recipe.model).is_dir():
        return load_model(recipe.model, dtype=torch.float32)
    model = Transformer(config)
    model.init_weights(recipe.seed)
    return model


def _global_batch(recipe: Recipe, world: dist.World) -> int:
    """Rows in one optimizer step."""
    return recipe.train.batch_size * recipe.train.accumulate * world.size


def _steps(recipe: Recipe, stage: TokenStage, world: dist.World) -> int:
    return recipe.train.steps or math.ceil(recipe.train.epochs * len(stage.train) / _global_batch(recipe, world))


def _bytes(model: Transformer, recipe: Recipe) -> int:
    """Disk that a checkpoint and the final weights take: masters, two moments at most, average, result."""
    return sum(p.numel() for p in model.parameters()) * 4 * (5 if recipe.train.ema else 4)


def _describe(shown: Progress, recipe: Recipe, stage: TokenStage, config: ModelConfig, world: dist.World) -> None:
    data, place = stage.train, stage.place
    ranks = f", {world.size} ranks" if world.size > 1 else ""
    shown.say(f"{recipe.model}: {num_parameters(config) / 1e6:.2f}M parameters on {place.device}{ranks}")
    shown.say(
        f"data: {data.documents:,} documents in {len(data):,} rows of {data.seq_len} ({100 * data.fill:.1f}% full), "
        f"{data.trained_tokens:,} trained tokens; {len(stage.val) if stage.val else 'no'} rows held out"
    )
    rows = _global_batch(recipe, world)
    shown.say(f"{shown.steps} steps of {rows} rows, {rows * data.seq_len:,} positions")


def _finish(loop: Loop, model: Transformer, tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """The stock model folder at the run's root, the plots, and the mark that the run is done, written last."""
    recipe, folder, state = loop.recipe, loop.folder, loop.state
    result = {
        "name": recipe.stage,
        "seconds": round(state.seconds, 3),
        "tokens": state.tokens,
        "steps": state.step,
        "metrics": loop.result(),
        "output": str(folder.path),
        "parameters": num_parameters(config),
    }
    if loop.world.main:
        with checkpoint.disk_errors(folder.path, _bytes(model, recipe)), loop.ema.applied():
            save_model(model, folder.path)
            tokenizer.save(folder.path)
        if recipe.log.plots:
            draw(folder.metrics, folder.path / "curves.png", recipe.stage)
        folder.finish(result)
    loop.world.barrier()
    return result
