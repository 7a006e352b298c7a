"""Which layers are meant? Names (q_proj), patterns (layers.[01].*proj) or "all", over the names that PEFT would use.

A linear layer is an nn.Linear, a quantised one (quantized.py), or GPT-2's Conv1D, which keeps its matrix the other way
round. "all" is what PEFT calls all-linear: every one but the head.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from groundup.errors import UserError


def inside(model: nn.Module) -> nn.Module:
    """The module inside which PEFT gives its names: what a foreign model wraps, else the model itself."""
    inner = getattr(model, "inner", None)
    return inner if isinstance(inner, nn.Module) else model


def is_linear(module: nn.Module) -> bool:
    quantised = hasattr(module, "dequantize") and hasattr(module, "in_features")
    return isinstance(module, nn.Linear) or quantised or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Conv1D of transformers, by name: to import it takes seconds."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def features(layer: nn.Module) -> tuple[int, int]:
    """(inputs D, outputs E) of a linear layer."""
    if is_transposed(layer):
        inputs, outputs = layer.get_parameter("weight").shape
        return inputs, outputs
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def matrix(layer: nn.Module) -> Tensor:
    """[E, D], without gradients; of a quantised layer the one that it computes with."""
    dequantize = getattr(layer, "dequantize", None)
    if dequantize is not None:
        made: Tensor = dequantize()
        return made
    weight = layer.get_parameter("weight").detach()
    return weight.T if is_transposed(layer) else weight


@torch.no_grad()
def set_matrix(layer: nn.Module, weight_ED: Tensor, bias_E: Tensor | None) -> None:
    """Give the layer another matrix (and bias), in the types of the old."""
    old = layer.get_parameter("weight")
    weight = (weight_ED.T if is_transposed(layer) else weight_ED).to(old.dtype).contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    if bias_E is not None:
        bias = layer.get_parameter("bias")
        layer.bias = nn.Parameter(bias_E.to(bias.dtype), requires_grad=bias.requires_grad)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer is; a quantised one has no parameters."""
    return next(tensor.device for tensors in (layer.parameters(), layer.buffers()) for tensor in tensors)


def head_path(model: nn.Module) -> str:
    """The name of the head's module, which a tied model of ours has not."""
    return _path(inside(model), "get_output_embeddings") or "lm_head"


def embedding_path(model: nn.Module) -> str:
    return _path(inside(model), "get_input_embeddings") or "model.embed_tokens"


def _path(root: nn.Module, getter: str) -> str | None:
    module = getattr(root, getter)() if hasattr(root, getter) else None
    return next((path for path, found in root.named_modules() if found is module), None)


def fits(path: str, pattern: str, where: str = "adapt.target") -> bool:
    """Whether a pattern describes a name, or all of its end from a dot on: `q_proj`, `mlp.*`, `layers.[01].*proj`."""
    try:
        return re.fullmatch(rf"(.*\.)?(?:{pattern})", path) is not None
    except re.error as error:
        raise UserError(where, f"{pattern!r} is no pattern ({error})", "write names such as q_proj") from None


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer under its name, the head too."""
    found = {path: module for path, module in inside(model).named_modules() if path and is_linear(module)}
    if any(path.endswith(".base") for path in found):
        raise UserError("adapt", "this model has an adapter already", "merge it first: groundup merge BASE ADAPTER")
    return found


def select(model: nn.Module, wanted: Sequence[str], without: Collection[str] = ()) -> dict[str, nn.Module]:
    """The linear layers that `wanted` names, in the model's order, but those named `without`.

    UserError: an entry that describes none.
    """
    layers = linear_layers(model)
    head = head_path(model)
    chosen: set[str] = set()
    for entry in wanted:
        found = {path for path in layers if (path != head if entry == "all" else fits(path, entry))}
        if not found:
            why = f"{entry!r} describes no linear layer of this model"
            raise UserError("adapt.target", why, suggestion(entry, layers))
        chosen |= found
    if not chosen:
        raise UserError("adapt.target", "names nothing", "name layers such as q_proj, or all")
    return {path: layer for path, layer in layers.items() if path in chosen and path not in without}


def suggestion(word: str, paths: Collection[str]) -> str:
    """The nearest of the names at the ends of `paths`, and all of them."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    near = difflib.get_close_matches(word.rpartition(".")[2], names, 1)
    return (f"did you mean {near[0]}? " if near else "") + f"there are: {', '.join(names)}"


def short_names(model: nn.Module, paths: Collection[str]) -> list[str]:
    """These modules in adapter_config.json: the ends of their names where those fit no other, else the whole."""
    names = {path.rpartition(".")[2] for path in paths}
    matched = {path for path, _ in inside(model).named_modules() if path.rpartition(".")[2] in names}
    return sorted(names) if matched == set(paths) else sorted(paths)
