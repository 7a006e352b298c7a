"""Some layers move, the others stay: the first n, the last n, and parameters by name. The whole model is saved."""

from __future__ import annotations

from typing import Any

from torch import nn

from groundup.adapt.targets import embedding_path, fits, head_path, inside, suggestion
from groundup.adapt.whole import is_tied
from groundup.config import AdaptConfig
from groundup.errors import UserError


def freeze(model: nn.Module, config: AdaptConfig) -> None:
    """Let the parts that the recipe names require gradients, and nothing else.

    A pattern describes a parameter or a module that holds it: `norm`, `layers.[01]`, `embed_tokens`.
    """
    found: Any = model.blocks
    blocks: list[nn.Module] = list(found)
    for key, count in (("first", config.first), ("last", config.last)):
        if count > len(blocks):
            raise UserError(f"adapt.{key}", f"{count} layers of {len(blocks)}", "name fewer, or use adapt.method=full")
    model.requires_grad_(False)
    for block in [*blocks[: config.first], *blocks[len(blocks) - config.last :]]:
        block.requires_grad_(True)
    parameters = dict(inside(model).named_parameters(remove_duplicate=False))
    if is_tied(model):
        parameters.setdefault(f"{head_path(model)}.weight", parameters[f"{embedding_path(model)}.weight"])
    for key, patterns in (("train", config.train), ("save", config.save)):
        for pattern in patterns:
            moving = [p for name, p in parameters.items() if fits(name, rf"(?:{pattern})(?:\..*)?", f"adapt.{key}")]
            if not moving:
                modules = [path for path, _ in inside(model).named_modules() if path]
                why = f"{pattern!r} describes no parameter of this model"
                raise UserError(f"adapt.{key}", why, suggestion(pattern, modules))
            for parameter in moving:
                parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("adapt", "freeze lets nothing move", "say what moves: adapt.first, adapt.last or adapt.train")
