"""What of an adapter goes to disk? PEFT's two files, so that either program reads what the other wrote.

adapter_config.json says what kind it is and for which base, adapter_model.safetensors holds what moved, under the names
that the model's own modules have. Types of PEFT: LORA (with rsLoRA, DoRA, PiSSA), IA3, PROMPT_TUNING, P_TUNING,
PREFIX_TUNING. BOTTLENECK is ours (bottleneck.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from groundup.adapt.adapted import Adapted
from groundup.adapt.bottleneck import load_bottleneck
from groundup.adapt.ia3 import load_ia3
from groundup.adapt.lora import load_lora
from groundup.errors import UserError
from groundup.files import write_atomic, write_json
from groundup.model.scored import Scored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # whose files these are
LAYERS = {"LORA": load_lora, "IA3": load_ia3, "BOTTLENECK": load_bottleneck}
SOFT = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def is_adapter(directory: str | Path) -> bool:
    return (Path(directory) / CONFIG).is_file()


def base_of(directory: str | Path) -> str:
    """The folder, or hub name, of the model that an adapter was trained on. UserError: it does not say."""
    base = read_config(directory).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        why = "does not say which model it was trained on"
        raise UserError(Path(directory) / CONFIG, why, 'write its folder there: "base_model_name_or_path": "..."')
    return base


def save_adapter(adapted: Adapted, directory: str | Path, base: str) -> None:
    """Write the adapter's two files, each whole or not at all. base: the folder of the model it belongs to.

    UserError: a full disk, a folder that may not be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapted.tensors().items()}
    common = {"auto_mapping": None, "base_model_name_or_path": base, "inference_mode": True, "revision": None}
    task = "SEQ_CLS" if isinstance(adapted.model, Scored) else "CAUSAL_LM"
    settings = {**common, "task_type": task, **adapted.settings(), **common, "peft_version": PEFT_VERSION}
    write_atomic(Path(directory) / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(Path(directory) / CONFIG, settings)


def load_adapter(model: nn.Module, directory: str | Path) -> Adapted:
    """Put an adapter onto its model, in place, not merged: the model's weights are frozen, the adapter's would move.

    UserError: no adapter there, a type that we have not, or one made for another model.
    """
    settings, tensors = read_adapter(directory)
    peft_type = settings.get("peft_type")
    if peft_type not in LAYERS and peft_type not in SOFT:
        why = f"peft_type {peft_type!r} is not supported"
        raise UserError(Path(directory) / CONFIG, why, f"supported: {', '.join([*LAYERS, *SOFT])}")
    if settings.get("task_type") == "SEQ_CLS" and not isinstance(model, Scored):
        why = "makes a reward model of its base: it scores answers and writes none"
        raise UserError(directory, why, "name it as the reward of a recipe, as --verifier, or to groundup serve")
    model.requires_grad_(False)
    try:
        if peft_type in LAYERS:
            return LAYERS[peft_type](model, settings, tensors)
        from groundup.adapt.soft import load_soft

        return load_soft(model, settings, tensors)
    except UserError as error:
        what = "" if error.where == "adapter" else f"{error.where} "
        raise UserError(directory, what + error.why, error.fix) from None


def read_adapter(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, the tensors) of an adapter's folder. UserError: either cannot be read."""
    settings, weights = read_config(directory), Path(directory) / WEIGHTS
    if not weights.is_file() and weights.with_suffix(".bin").is_file():
        fix = "save it with PEFT as safetensors: PeftModel.from_pretrained(...).save_pretrained(folder)"
        raise UserError(weights.with_suffix(".bin"), "is a pickle, which could run any program", fix)
    try:
        return settings, load_file(weights)
    except (OSError, SafetensorError) as error:
        raise _unreadable(directory, error) from None


def read_config(directory: str | Path) -> dict[str, Any]:
    """adapter_config.json. UserError: there is none that can be read."""
    try:
        settings = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error) from None
    if not isinstance(settings, dict):
        raise UserError(Path(directory) / CONFIG, "holds no JSON object", "save or fetch the adapter again")
    return settings


def _unreadable(directory: str | Path, error: Exception) -> UserError:
    return UserError(directory, f"no adapter can be read here ({error})", "name a folder as PEFT saves it")
