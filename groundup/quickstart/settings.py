"""Settings of the stages after fine-tuning, for a model of one to two million parameters on two cores.

Rates are high: so small a model moves little by a step. What was tried on the way here, on the held-out side of seed 0,
is in docs/LOG.md.
"""

from __future__ import annotations

from typing import Any

from groundup.model.config import ModelConfig, num_parameters
from groundup.model.cut import smaller

Recipe = dict[str, Any]

# What each stage is to reach; figures of docs/RESULTS.md.
WANTED: dict[str, dict[str, str]] = {
    "reward": {"accuracy": ">= 0.9"},
    "dpo": {"preferred_rate_gain": ">= 0.3", "world_exact_change": ">= -0.02"},
    "ppo": {"reward_gain_sd": ">= 1", "kl": "< 10"},
    "grpo": {"arithmetic_gain": ">= 0.2", "format_rate": ">= 0.95"},
    "distill": {"accuracy_kept": ">= 0.9", "gain_over_no_teacher": "> 0"},
    "majority": {"gain": ">= 0.05"},
}

ADAMW: Recipe = {"name": "adamw", "weight_decay": 0.0, "betas": [0.9, 0.99]}
CONSTANT: Recipe = {**ADAMW, "schedule": "constant", "warmup": 0.05}
HEALTH: Recipe = {"entropy_bounds": [0.0, 9.0]}  # --minutes 0.1 leaves a model near random, and goes on
DECAYING: Recipe = {**ADAMW, "schedule": "cosine", "warmup": 0.05, "min_lr_ratio": 0.1}

REWARD: Recipe = {
    "train": {"steps": 200, "batch_size": 8, "seq_len": 256, "eval_every": 100, "eval_rows": 1000},
    "optim": {**DECAYING, "lr": 3e-4},
}
DPO: Recipe = {
    "preference": {"loss": "dpo", "beta": 0.1, "sft_weight": 1.0},  # the chosen answers are right: it shall stay so
    "train": {"steps": 120, "batch_size": 8, "seq_len": 256},
    "optim": {**DECAYING, "lr": 1e-4},
}
PPO: Recipe = {
    "rl": {
        **HEALTH,
        "prompts": 32,
        "max_tokens": 32,
        "missing_eos_penalty": 1.0,
        "reward_clip": 5.0,
        "kl_stop": 0.05,
    },
    "train": {"steps": 80, "batch_size": 8, "seq_len": 256, "eval_every": 80},
    "optim": {**CONSTANT, "lr": 5e-5},
}
COLD_START: Recipe = {  # a dose of it
    "train": {"steps": 60, "batch_size": 8, "seq_len": 256},
    "optim": {**DECAYING, "lr": 2e-3},
    "eval": {"fraction": 0.0},
}
THOUGHTFUL: Recipe = {  # until thoughts hold together when they are drawn at random
    "train": {"steps": 300, "batch_size": 8, "seq_len": 256},
    "optim": {**DECAYING, "lr": 2e-3},
    "eval": {"fraction": 0.0},
}
GRPO: Recipe = {
    "rl": {
        **HEALTH, "prompts": 16, "group_size": 16, "max_tokens": 48,
        "rewards": [{"name": "exact"}, {"name": "format", "weight": 0.2, "args": {"tags": ["think", ""]}}],
    },
    "train": {"steps": 140, "batch_size": 16, "seq_len": 256, "eval_every": 70},
    "optim": {**CONSTANT, "lr": 1.5e-4},
}  # fmt: skip
DISTILL: Recipe = {
    "train": {"steps": 1800, "batch_size": 8, "seq_len": 256},
    "optim": {"name": "muon", "lr": 1e-2, "muon_lr": 2e-2, "schedule": "linear", "warmup": 0.02, "min_lr_ratio": 0.0,
              "weight_decay": 0.0},
    "eval": {"fraction": 0.0},
}  # fmt: skip
MAJORITY: dict[str, Any] = {"budget": 16, "max_tokens": 48, "temperature": 0.7}


def student(teacher: str) -> dict[str, int]:
    """Width, heads and feed-forward neurons of a student of at most a quarter of the teacher's parameters: half as
    wide, half of the heads in whole groups, as many neurons as there is room for (16 at least)."""
    config = ModelConfig.from_dir(teacher)
    group = config.num_attention_heads // config.num_key_value_heads
    heads = max(group, -(-config.num_attention_heads // 2 // group) * group)
    shape = {"width": max(8, config.hidden_size // 2), "heads": heads}
    room = num_parameters(config) / 4
    fits = (
        n
        for n in range(config.intermediate_size, 0, -16)
        if num_parameters(smaller(config, intermediate=n, **shape)) <= room
    )
    return {**shape, "intermediate": next(fits, min(16, config.intermediate_size))}
