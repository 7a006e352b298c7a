"""Where does a token stand? Rotary position embeddings: the angles (applying them is ops/rope.py).

Pair i of a head turns by position x inv_freq[i]; a query and a key then meet at an angle that depends on their
distance alone. Scaling stretches the slow pairs so that a model reads further than it was trained to.
RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); the llama3 rule is that of Llama 3.1's release.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from groundup.model.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """(inv_freq [head_dim / 2] in radians a position, factor on cos and sin), fp32 on the CPU."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / config.rope_theta**pairs
    scaling = config.rope_scaling
    if not scaling:
        return inv_freq, 1.0
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    return _yarn(inv_freq, scaling, config), _yarn_attention_factor(scaling)


def rope_table(
    inv_freq: torch.Tensor, factor: float, position_ids_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_BTd, sin_BTd), d = head_dim / 2, fp32: angles in lower precision drift by whole turns at long range."""
    kind = position_ids_BT.device.type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
        angle_BTd = position_ids_BT[..., None].float() * inv_freq
        return angle_BTd.cos() * factor, angle_BTd.sin() * factor


def _llama3(inv_freq: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / scaling["factor"])


def _yarn(inv_freq: torch.Tensor, scaling: dict[str, Any], config: ModelConfig) -> torch.Tensor:
    """As llama3, but the blend is linear in the pair's index between two numbers of turns (beta_fast, beta_slow)."""
    original, dim = scaling["original_max_position_embeddings"], config.head_dim

    def index_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = index_of(scaling.get("beta_fast") or 32), index_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 if first == last else 0  # a ramp of no width
    slow = ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return inv_freq * (1 - slow) + inv_freq / scaling["factor"] * slow


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """Sharper attention over a longer range: 0.1 ln(factor) + 1 unless the config says otherwise."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def gain(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return gain(scaling["mscale"]) / gain(scaling["mscale_all_dim"])
    return gain(1.0)
