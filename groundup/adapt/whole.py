"""What is trained and saved whole beside an adapter? Embeddings and head, where tokens were added (modules_to_save).

PEFT knows embedding and head as two modules even where they share one matrix. We train that one, and write it under
both names; a file in which they differ makes them two, and one that holds more rows makes them larger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groundup.adapt.targets import embedding_path, head_path, inside, suggestion
from groundup.errors import UserError


class Whole:
    """Modules of a frozen model that move, by their names in it; from now on in fp32, as all that is trained."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model = model
        self.modules = {path: inside(model).get_submodule(path) for path in paths}
        self.start: list[Tensor] | None = None
        for module in self.modules.values():
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)

    @classmethod
    def find(cls, model: nn.Module, names: Sequence[str]) -> Whole:
        """By the ends of their names. embed_tokens and lm_head also mean what another architecture calls otherwise."""
        there = [path for path, _ in inside(model).named_modules() if path]
        roles = {"embed_tokens": embedding_path(model), "lm_head": head_path(model)}
        paths: dict[str, None] = {}
        for name in names:
            found = [path for path in there if path == name or path.endswith("." + name)] or [roles.get(name, "")]
            if is_tied(model):
                found = [roles["embed_tokens"] if path == roles["lm_head"] else path for path in found]
            if not set(found) <= set(there):
                why = f"{name!r} is no module of this model"
                raise UserError("adapt.save", why, suggestion(name, [*there, *roles]))
            paths |= dict.fromkeys(found)
        return cls(model, list(paths))

    @classmethod
    def read(cls, model: nn.Module, tensors: Mapping[str, Tensor]) -> Whole:
        """Those that a file holds, with its values. UserError: a name or a shape that this model has not."""
        tensors = dict(tensors)
        embedding, head = (tensors.get(f"{path(model)}.weight") for path in (embedding_path, head_path))
        if is_tied(model):
            if embedding is not None and head is not None and torch.equal(embedding, head):
                del tensors[f"{head_path(model)}.weight"]
            elif embedding is not None or head is not None:
                untie(model)
        rows = len(inside(model).get_parameter(f"{embedding_path(model)}.weight")) if embedding is not None else 0
        if embedding is not None and head is not None and len(embedding) == len(head) != rows:
            _resize(model, len(embedding))
        own = dict(inside(model).named_parameters(remove_duplicate=False))
        for name, tensor in tensors.items():
            if name not in own:
                why = f"{name} changes nothing that this model has"
                raise UserError("adapter", why, "use an adapter of this model")
            if own[name].shape != tensor.shape:
                why = f"{name} is {tuple(tensor.shape)}, this model's is {tuple(own[name].shape)}"
                raise UserError("adapter", why, "use the base, with the vocabulary, that it was trained on")
        whole = cls(model, list(dict.fromkeys(name.rpartition(".")[0] for name in tensors)))
        whole.load(tensors)
        return whole

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{path}.{name}": t.detach() for path, m in self.modules.items() for name, t in m.named_parameters()}
        if self.shared():
            found[f"{head_path(self.model)}.weight"] = found[f"{embedding_path(self.model)}.weight"].clone()
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters():
                if f"{path}.{name}" in tensors:
                    parameter.copy_(tensors[f"{path}.{name}"])

    def keep_start(self) -> None:
        """Remember the numbers as they are, for `as_at_start`."""
        self.start = [parameter.detach().clone() for parameter in self._parameters()]

    @contextmanager
    def as_at_start(self) -> Iterator[None]:
        """The modules with the numbers of `keep_start`, while the context lasts."""
        parameters = self._parameters()
        if self.start is None and parameters:
            raise ValueError("nothing was kept: call keep_start before training")
        now = [parameter.data for parameter in parameters]
        _exchange(parameters, self.start or [])
        try:
            yield
        finally:
            _exchange(parameters, now)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def settings(self) -> dict[str, Any]:
        paths = sorted([*self.modules, *([head_path(self.model)] if self.shared() else [])])
        return {"modules_to_save": paths or None}

    def shared(self) -> bool:
        """Whether the embedding is among them, and with it the head."""
        return embedding_path(self.model) in self.modules and is_tied(self.model)


def _exchange(parameters: Sequence[nn.Parameter], numbers: Sequence[Tensor]) -> None:
    for parameter, data in zip(parameters, numbers, strict=True):
        parameter.data = data
    torch.clear_autocast_cache()  # it knows weights by their place, and would give what it has cast of the others


def is_tied(model: nn.Module) -> bool:
    """Whether embedding and head are one matrix."""
    root = inside(model)
    modules = dict(root.named_modules())
    head, embedding = modules.get(head_path(model)), modules.get(embedding_path(model))
    return head is None or (embedding is not None and getattr(head, "weight", None) is embedding.weight)


def _resize(model: Any, rows: int) -> None:
    """Make room in embedding and head for so many tokens; what stands there is for the caller to fill in."""
    root: Any = inside(model)
    if hasattr(root, "resize_token_embeddings"):
        root.resize_token_embeddings(rows, mean_resizing=False)
        model.requires_grad_(False)
    else:
        width = model.config.hidden_size
        made = {"num_embeddings": root.model.embed_tokens} | ({} if is_tied(model) else {"out_features": root.lm_head})
        for name, module in made.items():
            module.weight = nn.Parameter(module.weight.new_empty(rows, width), requires_grad=False)
            setattr(module, name, rows)
    _set_config(model, vocab_size=rows)


def untie(model: nn.Module) -> None:
    """Make embedding and head two matrices of the same numbers."""
    root = inside(model)
    embedding: Any = root.get_submodule(embedding_path(model))
    if head_path(model) not in dict(root.named_modules()):
        rows, width = embedding.weight.shape
        head = nn.Linear(width, rows, bias=False, device="meta")
        head.weight = embedding.weight
        root.lm_head = head
    embedding.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    _set_config(model, tie_word_embeddings=False)


def _set_config(model: nn.Module, **changed: Any) -> None:
    """In our record of the model, and in transformers' own where there is one."""
    for owner in {id(m): m for m in (model, inside(model))}.values():
        config: Any = owner.config
        try:
            for name, value in changed.items():
                setattr(config, name, value)
        except dataclasses.FrozenInstanceError:
            owner.config = dataclasses.replace(config, **changed)
