"""Which method, then? Freeze the model and let the part that the recipe names move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from groundup.adapt.adapted import Adapted
from groundup.adapt.bottleneck import bottleneck
from groundup.adapt.freeze import freeze
from groundup.adapt.ia3 import ia3
from groundup.adapt.lora import lora
from groundup.adapt.whole import Whole
from groundup.config import AdaptConfig
from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer


def adapt(model: nn.Module, config: AdaptConfig, seed: int, tokenizer: Tokenizer | None = None) -> Adapted | None:
    """Prepare `model`, in place, for tuning by `config.method`; None where the model itself moves (full, freeze).

    What is drawn depends on `seed` alone. tokenizer: for a prompt that starts from words. UserError: settings that do
    not go together, or name what the model has not.
    """
    if config.method in ("full", "freeze"):
        if config.base != "full":
            why = f"a base in {config.base} cannot move, and {config.method} moves it"
            raise UserError("adapt.base", why, "use adapt.base=full, or adapt.method=lora")
        model.requires_grad_(True)
        if config.method == "freeze":
            freeze(model, config)
        return None
    model.requires_grad_(False)
    if config.method in ("prompt", "p_tuning", "prefix", "p_tuning_v2"):
        from groundup.adapt.soft import soft_prompt

        _quantize(model, config)
        return soft_prompt(model, config, seed, tokenizer)
    whole = Whole.find(model, config.save)
    _quantize(model, config)  # what is frozen by now, so not what moves whole
    if config.method == "lora":
        return lora(model, config, seed, whole)
    if config.method == "ia3":
        return ia3(model, config, whole)
    return bottleneck(model, config, seed, whole)


def _quantize(model: nn.Module, config: AdaptConfig) -> None:
    if config.base != "full":
        from groundup.adapt.quantized import quantize_base

        quantize_base(model, config.base, config.double_quant)
