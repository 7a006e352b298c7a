"""Minutes to the same quality: how soon ours reaches what AdamW + cosine with usual settings reaches in ten minutes.

Both train by the same fast loop on the same text, so this is about steps, not kernels. A schedule needs its length in
advance: ours is run at a share of the baseline's time, then longer if it did not get there. Time is steps x the median
time of a step, which is measured before in turns, so that a busy moment harms nobody; evaluation does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.material import Material
from bench.measure import Program, take_turns
from bench.options import Options
from bench.parts.presets import model_config

# Usual: initialised as transformers does, 8k tokens a step, AdamW (.9, .95), weight decay .1, warm-up 3 %, cosine to a
# tenth. The learning rate was the best of 1e-3, 3e-3 and 6e-3 on a model of a fifth of the size and length; `--sweep`
# trains the baseline at each of RATES for the whole time and holds ours against the best.
BASELINE: dict[str, Any] = {
    "train": {"batch_size": 16},
    "optim": {"name": "adamw", "lr": 6e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "schedule": "cosine",
              "warmup": 0.03, "min_lr_ratio": 0.1},
}  # fmt: skip
RATES = (1e-3, 3e-3, 6e-3, 1e-2)
# Ours: the model's own initialisation (output projections at zero), Muon, a straight line to zero, the embedding's rate
# as in the quickstart. Half the batch: twice the steps are worth more than Muon's share of a step, which grows.
OURS: dict[str, Any] = {
    "train": {"batch_size": 8},
    "optim": {"name": "muon", "lr": 1e-2, "muon_lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "schedule": "linear",
              "warmup": 0.02, "min_lr_ratio": 0.0},
}  # fmt: skip
SHARES = (0.6, 0.8, 1.0)  # of the baseline's time, tried in this order until the quality is reached
EVALUATIONS = 12
PRESET = "5m"


def run(options: Options, material: Material, say: Callable[[str], None]) -> dict[str, Any]:
    name = PRESET if PRESET in options.presets else options.presets[0]
    config = model_config(name, options)
    common = {
        "stage": "pretrain", "data": [str(path) for path in material.text],
        "tokenizer": str(material.tokenizer_dir(config["vocab_size"])), "cache": str(material.work / "shards"),
        "train": {"seq_len": options.seq_len, "dtype": options.dtype, "device": options.device, "compile": "off"},
        "eval": {"fraction": 0.03}, "log": {"plots": False},
    }  # fmt: skip
    baseline = merge(common, {**BASELINE, "model": usual_start(config, material.work / f"usual-{name}")})
    ours = merge(common, {**OURS, "model": material.model(name, config, options.shape)})
    seconds = step_seconds([baseline, ours], options, say)
    budget = options.minutes * 60
    rates = RATES if options.sweep else (BASELINE["optim"]["lr"],)
    swept = [
        train(with_rate(baseline, rate), budget / seconds[0], material.work / "minutes-baseline", say) | {"lr": rate}
        for rate in rates
    ]
    target = min(swept, key=lambda one: one["bits_per_byte"])
    tries = []
    for share in SHARES:
        curve = train(ours, share * budget / seconds[1], material.work / f"minutes-ours-{share}", say)
        step = crossing(curve["curve"], target["bits_per_byte"])
        tries.append({"share_of_time": share, **curve, "reached_at_step": step})
        if step is not None:
            break
    reached = tries[-1]["reached_at_step"]
    return {
        "minutes_ratio": None if reached is None else reached * seconds[1] / (target["steps"] * seconds[0]),
        "minutes": {
            "preset": name,
            "baseline": target | {"settings": BASELINE, "step_seconds": seconds[0]},
            "swept": {one["lr"]: one["bits_per_byte"] for one in swept},
            "ours": {"tries": tries, "settings": OURS, "step_seconds": seconds[1]},
        },
    }


def merge(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A recipe with its sections joined."""
    both = {**common, **own}
    both["train"] = {**common["train"], **own["train"]}
    return both


def with_rate(recipe: dict[str, Any], rate: float) -> dict[str, Any]:
    return {**recipe, "optim": {**recipe["optim"], "lr": rate}}


def usual_start(config: dict[str, Any], folder: Path) -> str:
    """A model folder with transformers' own initial weights (normal, 0.02)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def step_seconds(recipes: Sequence[dict[str, Any]], options: Options, say: Callable[[str], None]) -> list[float]:
    """Seconds a step of each recipe, measured in turns."""
    programs = [
        Program("ours", "bench.peers.recipe", {"recipe": recipe, "device": options.device, "warmup": 3}).start()
        for recipe in recipes
    ]
    take_turns(programs, options.rounds, options.seconds)
    for one in programs:
        one.stop()
    found = [statistics.median(r["seconds"] / r["steps"] for r in one.rounds) for one in programs]
    say(f"minutes: a step takes {found[0]:.3f} s (baseline) and {found[1]:.3f} s (ours)")
    return found


def train(recipe: dict[str, Any], steps: float, output: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train for so many steps, with evaluations; the whole held-out share is read at each."""
    import shutil

    from groundup.train.run import train as run_recipe

    shutil.rmtree(output, ignore_errors=True)
    total = max(2, round(steps))
    every = max(1, total // EVALUATIONS)
    curve: list[tuple[int, float]] = []
    seconds = [0.0, 0.0]  # so far; tokens so far

    def hook(figures: dict[str, Any]) -> None:
        if "bits_per_byte" in figures:
            curve.append((figures["step"], figures["bits_per_byte"]))
        else:
            seconds[0] += (figures["tokens"] - seconds[1]) / figures["tokens_per_second"]
            seconds[1] = figures["tokens"]

    length = {"steps": total, "eval_every": every, "save_every": 2 * total, "eval_rows": 10_000}
    run_recipe({**recipe, "output": str(output), "train": recipe["train"] | length}, progress=hook)
    say(f"  {total} steps: {curve[-1][1]:.4f} bits per byte in {seconds[0] / 60:.1f} minutes of training")
    return {"steps": total, "bits_per_byte": curve[-1][1], "training_minutes": seconds[0] / 60, "curve": curve}


def crossing(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """The step, interpolated, at which a curve of (step, bits per byte) first reaches the target; None if never."""
    for i, (step, value) in enumerate(curve):
        if value <= target:
            if i == 0:
                return float(step)
            before, above = curve[i - 1]
            return before + (step - before) * (above - target) / (above - value)
    return None


def show(result: dict[str, Any]) -> Table:
    figures = result["minutes"]
    base, tries = figures["baseline"], figures["ours"]["tries"]
    table = Table("run", "steps", "s / step", "minutes", "bits per byte", title="Minutes to the same quality")
    per = base["step_seconds"]
    adamw = f"AdamW + cosine, {base['lr']:g}"
    table.add_row(adamw, str(base["steps"]), f"{per:.3f}", f"{base['steps'] * per / 60:.1f}",
                  f"{base['bits_per_byte']:.4f}")  # fmt: skip
    per = figures["ours"]["step_seconds"]
    for one in tries:
        table.add_row("ours", str(one["steps"]), f"{per:.3f}", f"{one['steps'] * per / 60:.1f}",
                      f"{one['bits_per_byte']:.4f}")  # fmt: skip
    ratio = result["minutes_ratio"]
    table.caption = f"the same quality after {ratio:.0%} of the time" if ratio else "the quality was not reached"
    return table
