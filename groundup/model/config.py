"""What shape is the model? One frozen record, spelled as Hugging Face's config.json spells it.

Read: the spelling of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5
(`rope_parameters`, `dtype`). Written: both at once, so that transformers 4 and 5, vLLM and llama.cpp's converter
read the same file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.model.foreign_config import ForeignConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class NotNative(UserError):
    """An architecture, or a detail of one, that we do not compute ourselves; transformers may (foreign.py)."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder family Llama / Qwen2 / Qwen3.

    model_type decides two details: qwen3 normalises queries and keys per head, qwen2 has biases on q, k and v.
    rope_scaling is None or {"rope_type": "linear" | "yarn" | "llama3", "factor": ..., ...}.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "qwen3"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise UserError("model config", problem, "correct the model's config.json or preset")

    @property
    def qk_norm(self) -> bool:
        """RMSNorm on each head's query and key before RoPE."""
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @classmethod
    def from_dir(cls, directory: str | Path) -> ModelConfig:
        """The config of a stock model folder. UserError: no config.json, not JSON; NotNative: no family we compute."""
        return cls.from_hf_dict(read_json(directory), where=Path(directory) / "config.json")

    @classmethod
    def from_hf_dict(cls, found: dict[str, Any], where: object = "config") -> ModelConfig:
        """Translate a config.json. Raises UserError naming `where` for anything we would compute wrongly."""
        _refuse_unsupported(found, where)
        model_type = found["model_type"]
        heads = found.get("num_attention_heads")
        values = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        values["num_key_value_heads"] = found.get("num_key_value_heads") or heads
        if not found.get("head_dim"):
            derived = found["hidden_size"] // heads if heads and found.get("hidden_size") else None
            values["head_dim"] = 128 if model_type == "qwen3" else derived
        if model_type == "qwen2":  # its bias is not an option, whatever the file says
            values.pop("attention_bias", None)
        if model_type != "llama":
            values.pop("mlp_bias", None)
        values["rope_theta"], values["rope_scaling"] = _read_rope(found)
        for name, default in _HF_DEFAULTS.items():
            values.setdefault(name, default)
        if model_type == "llama":
            values.setdefault("max_position_embeddings", 2048)
        missing = [name for name in SIZES if values.get(name) is None]
        if missing:
            raise UserError(where, f"missing {', '.join(missing)}", "fetch or save the model again")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(where, error.why, error.fix) from None

    def to_hf_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """The stock config.json of this model, in the old and the new spelling of RoPE and dtype."""
        rope_scaling = dict(self.rope_scaling) if self.rope_scaling else None
        written: dict[str, Any] = {"architectures": [ARCHITECTURES[self.model_type]]}
        written.update({field.name: getattr(self, field.name) for field in fields(self)})
        if self.model_type != "llama":
            del written["mlp_bias"]
            written.update(use_sliding_window=False, sliding_window=None)
        if self.model_type == "qwen2":
            del written["attention_bias"]
        written.update(
            hidden_act="silu",
            attention_dropout=0.0,
            use_cache=True,
            rope_scaling=rope_scaling,
            rope_parameters={"rope_theta": self.rope_theta, **(rope_scaling or {"rope_type": "default"})},
            dtype=dtype,
            torch_dtype=dtype,
        )
        return written


def read_json(directory: str | Path) -> dict[str, Any]:
    """What config.json of a model folder says. UserError: none there, or no JSON object."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(directory, "no config.json here", "name a model folder as transformers saves it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(path, f"not valid JSON ({error})", "fetch or save the model again") from None
    if not isinstance(found, dict):
        raise UserError(path, "holds no JSON object", "fetch or save the model again")
    return found


# What transformers assumes for a key that config.json leaves out; our own defaults are those of a new model.
_HF_DEFAULTS = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def num_parameters(config: ModelConfig | ForeignConfig) -> int:
    """Numbers in all parameters, the tied embedding counted once."""
    if not isinstance(config, ModelConfig):
        return config.num_parameters
    c, width, q, kv = config, config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = width * c.head_dim * (2 * q + 2 * kv) + (2 * c.head_dim if c.qk_norm else 0)
    attention += c.head_dim * (q + 2 * kv) if c.qkv_bias else 0
    attention += width if c.attention_bias else 0
    mlp = 3 * width * c.intermediate_size + (2 * c.intermediate_size + width if c.mlp_bias else 0)
    embeddings = c.vocab_size * width * (1 if c.tie_word_embeddings else 2)
    return embeddings + c.num_hidden_layers * (attention + mlp + 2 * width) + width


def _read_rope(found: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from either spelling; `rope_scaling` wins over `rope_parameters`, as in transformers."""
    scaling = dict(found.get("rope_scaling") or found.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", None) or (found.get("rope_parameters") or {}).get("rope_theta")
    theta = found.get("rope_theta") or theta or 10_000.0
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind == "default":
        return float(theta), None
    if kind in ("yarn", "llama3"):
        fallback = found.get("max_position_embeddings", 2048 if found["model_type"] == "llama" else 32768)
        scaling.setdefault("original_max_position_embeddings", fallback)
    return float(theta), {"rope_type": kind, **scaling}


def _refuse_unsupported(found: dict[str, Any], where: object) -> None:
    """Refuse what would load and then compute something else than its authors did."""
    supported = ", ".join(ARCHITECTURES)
    if found.get("quantization_config"):
        raise UserError(where, "the weights are quantised", "use the unquantised model")
    model_type = found.get("model_type")
    if model_type not in ARCHITECTURES:
        raise NotNative(where, f"model_type {model_type!r} is not one we compute", f"supported: {supported}")
    if found.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NotNative(where, f"hidden_act {found['hidden_act']!r} is not supported", "supported: silu")
    windowed = any(kind != "full_attention" for kind in found.get("layer_types") or [])
    if windowed or (found.get("use_sliding_window") and found.get("sliding_window") and not found.get("layer_types")):
        raise NotNative(where, "sliding-window attention is not supported", "use a model with full attention")
    rope = {**(found.get("rope_parameters") or {}), **(found.get("rope_scaling") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise NotNative(where, f"RoPE type {kind!r} is not supported", f"supported: {', '.join(ROPE_TYPES)}")
    if (found.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise NotNative(where, "partial rotary embeddings are not supported", f"supported: {supported}, full rotation")


def _problem(config: ModelConfig) -> str | None:
    """The first thing about these sizes that cannot be, or None."""
    if config.model_type not in ARCHITECTURES:
        return f"model_type {config.model_type!r} is not one of {', '.join(ARCHITECTURES)}"
    for name in SIZES:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            return f"{name} must be a positive whole number, not {value!r}"
    if config.num_attention_heads % config.num_key_value_heads:
        return (
            f"num_attention_heads {config.num_attention_heads} is no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        return f"head_dim {config.head_dim} is odd, RoPE rotates pairs"
    if config.rope_scaling:
        needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        for name in needed.get(config.rope_scaling["rope_type"], ("factor",)):
            if not isinstance(config.rope_scaling.get(name), (int, float)):
                return f"RoPE type {config.rope_scaling['rope_type']} needs a number for {name}"
    return None
