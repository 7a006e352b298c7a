"""What shape is a model that transformers computes? Its own config, answering to the names of ours."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groundup.errors import UserError
from groundup.model.config import read_json

# What architectures call the longest text they know; none of them: as far as it goes.
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
ENDLESS = 32768


@dataclass(frozen=True)
class ForeignConfig:
    """stock: transformers' config of the whole model; all else is read from it, and of a model that sees pictures too
    from the part that reads text."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    stock: Any = field(repr=False, compare=False)

    @classmethod
    def from_dir(cls, directory: str | Path) -> ForeignConfig:
        """UserError: not a folder of a causal language model that transformers knows, or one that we would train
        wrongly. No code of the folder is run."""
        from transformers import AutoConfig

        path, found = Path(directory) / "config.json", read_json(directory)
        kind = found.get("model_type")
        if found.get("quantization_config"):
            raise UserError(path, "the weights are quantised", "use the unquantised model")
        try:
            stock = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a config class says of its own file
            known = kind in _known_types()
            why = f"is no config of {kind} ({error})" if known else f"model_type {kind!r} is not known to transformers"
            raise UserError(path, why, _way_out(kind, found)) from None
        return cls.from_stock(stock, path)

    @classmethod
    def from_stock(cls, stock: Any, where: object = "config") -> ForeignConfig:
        """Of transformers' config. UserError as from_dir."""
        from transformers import AutoModelForCausalLM

        text, kind = stock.get_text_config(), stock.model_type
        if type(stock) not in AutoModelForCausalLM._model_mapping:
            raise UserError(where, f"{kind} is no causal language model", "use one that writes on from a text")
        cap = getattr(text, "final_logit_softcapping", None)
        if cap:
            why = f"{kind} caps its logits (final_logit_softcapping {cap:g}), which the losses here do not compute"
            raise UserError(where, why, "use a model without, such as gemma or gemma3")
        heads = getattr(text, "num_attention_heads", None) or 1
        width = text.hidden_size
        return cls(
            model_type=kind,
            vocab_size=text.vocab_size,
            hidden_size=width,
            intermediate_size=_first(text, ("intermediate_size", "ffn_dim", "n_inner"), 4 * width),
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or width // heads,
            max_position_embeddings=_first(text, CONTEXT, ENDLESS),
            tie_word_embeddings=bool(getattr(stock, "tie_word_embeddings", False)),
            **{name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
            stock=stock,
        )

    @functools.cached_property
    def num_parameters(self) -> int:
        """Numbers in all parameters, the tied embedding counted once."""
        return sum(p.numel() for p in self.build("meta").parameters())

    def build(self, device: torch.device | str, **changes: Any) -> nn.Module:
        """A model of this shape with weights that say nothing, fp32: transformers' own. changes: to its text config."""
        from transformers import AutoModelForCausalLM

        stock = copy.deepcopy(self.stock)
        text = stock.get_text_config()
        for name, value in changes.items():
            setattr(text, name, value)
        kinds = getattr(text, "layer_types", None)
        if kinds and len(kinds) > text.num_hidden_layers:
            text.layer_types = list(kinds)[: text.num_hidden_layers]
        for config in (stock, text):
            if (getattr(config, "pad_token_id", None) or 0) >= text.vocab_size:
                config.pad_token_id = None
        with torch.device(device):
            return AutoModelForCausalLM.from_config(stock, dtype=torch.float32, trust_remote_code=False)


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    """The first of these that is a positive whole number."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), default)


def _known_types() -> set[str]:
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def _way_out(kind: Any, found: dict[str, Any]) -> str:
    if str(kind).lower().startswith("minimind"):
        return "make a stock folder of it: groundup convert DIR --output NEW"
    if found.get("auto_map"):
        return "it comes with code of its own, which is never run here; use a model that transformers has built in"
    return "fetch it again, or use another version of transformers"
