"""How large is a step? The learning rate as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from groundup.config import OptimConfig


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` is a number of steps if 1 or more, else a share of the run; never longer than the run."""
    return min(steps, int(warmup) if warmup >= 1 else round(warmup * steps))


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate over its peak at `step` (0-based) of `steps`.

    Linear warm-up that reaches 1 on its last step, then one of
      cosine    half a cosine down to min_lr_ratio (Loshchilov & Hutter 2016)
      linear    straight down to min_lr_ratio
      wsd       flat, then straight down over the last `decay` share of the run (Hu et al. 2024, MiniCPM)
      constant  flat
    The last step stands at min_lr_ratio exactly (but for `constant`).
    """
    warm = warmup_steps(config.warmup, steps)
    if step < warm:
        return (step + 1) / warm
    floor, last = config.min_lr_ratio, steps - 1
    if config.schedule == "constant":
        return 1.0
    start = max(warm - 1, 0)
    if config.schedule == "wsd":
        start = max(start, last - max(1, round(config.decay * steps)))
    share = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    down = 0.5 * (1 + math.cos(math.pi * share)) if config.schedule == "cosine" else 1 - share
    return floor + (1 - floor) * down
