"""How far apart do positions look? config.json's rope_scaling as GGUF fields, and back.

linear and yarn are fields of the format. llama3 is not: its factor a frequency is a tensor, which llama.cpp reads for
`llama` only; the numbers that it was computed from go along under names of our own, so that they come back exact.
llama.cpp multiplies cos and sin by (0.1 ln factor + 1) x attn_factor under yarn (ggml's rope_yarn), so ours is divided.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from groundup.errors import UserError
from groundup.export.reader import GgufFile, shortest
from groundup.model.config import ModelConfig
from groundup.model.rope import rope_frequencies

LLAMA3 = ("low_freq_factor", "high_freq_factor")
LLAMA3_RELEASED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_fields(config: ModelConfig) -> dict[str, Any]:
    """GGUF fields, without the architecture before their names. UserError for what llama.cpp does not compute."""
    fields: dict[str, Any] = {"rope.freq_base": config.rope_theta, "rope.dimension_count": config.head_dim}
    scaling = config.rope_scaling
    if not scaling:
        return fields
    kind, factor = scaling["rope_type"], float(scaling["factor"])
    if kind == "llama3":
        if config.model_type != "llama":
            raise UserError("rope_scaling", f"llama.cpp has no llama3 scaling for {config.model_type}", "use yarn")
        fields |= {f"rope.scaling.{name}": float(scaling[name]) for name in LLAMA3}
        return fields | {"rope.scaling.original_context_length": scaling["original_max_position_embeddings"]}
    fields |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "linear":
        return fields
    if not scaling.get("truncate", True) or (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1) != (32, 1):
        # The format has fields for the betas, but llama.cpp reads them for a few other architectures only.
        why = "llama.cpp computes yarn with beta_fast 32, beta_slow 1 and truncate: true only"
        raise UserError("rope_scaling", why, "export to hf instead")
    fields["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    fields["rope.scaling.attn_factor"] = rope_frequencies(config)[1] / _built_in_gain(factor)
    return fields


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What each frequency is divided by, [head_dim / 2] fp32, where that is a tensor of the file."""
    if not config.rope_scaling or config.rope_scaling["rope_type"] != "llama3":
        return None
    plain = dataclasses.replace(config, rope_scaling=None)
    return (rope_frequencies(plain)[0] / rope_frequencies(config)[0]).numpy()


def read_rope_scaling(file: GgufFile, config: ModelConfig, factors: np.ndarray | None) -> dict[str, Any] | None:
    """rope_scaling of a GGUF; config: all else, without scaling. UserError where no rule of ours gives its numbers."""
    if factors is not None:
        return _read_llama3(file, config, factors)
    kind, factor = file.own("rope.scaling.type", "none"), file.own("rope.scaling.factor", 0.0)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(file.path, f"RoPE scaling {kind!r} is not supported", "supported: linear, yarn, llama3")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": shortest(factor)}
    if kind == "linear":
        return scaling
    original = file.own("rope.scaling.original_context_length", config.max_position_embeddings)
    scaling["original_max_position_embeddings"] = original
    gain = file.own("rope.scaling.attn_factor", 1.0)
    if abs(gain - 1.0) > 1e-6:
        scaling["attention_factor"] = float(f"{gain * _built_in_gain(factor):.6g}")
    return scaling


def _read_llama3(file: GgufFile, config: ModelConfig, factors: np.ndarray) -> dict[str, Any]:
    """The rule that gives these factors: the file's own numbers, else those of Llama 3.1's release."""
    original = file.own("rope.scaling.original_context_length", None)
    named = {name: file.own(f"rope.scaling.{name}", None) for name in LLAMA3}
    candidates = [LLAMA3_RELEASED]
    if original and all(named.values()):
        own = {name: shortest(value) for name, value in named.items()}
        candidates.insert(0, {**own, "original_max_position_embeddings": original})
    for numbers in candidates:
        scaling = {"rope_type": "llama3", "factor": shortest(float(factors.max())), **numbers}
        found = rope_factors(dataclasses.replace(config, rope_scaling=scaling))
        if found is not None and found.shape == factors.shape and np.allclose(found, factors, rtol=1e-4):
            return scaling
    raise UserError(file.path, "its RoPE factors follow no rule that we know", "supported: linear, yarn, llama3")


def _built_in_gain(factor: float) -> float:
    """What llama.cpp itself does to cos and sin under yarn."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
