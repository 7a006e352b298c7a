"""How does an adapter take hold of a layer? A part stands in the layer's place and keeps the layer inside as `base`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from groundup.adapt.adapted import Adapted
from groundup.adapt.targets import inside, matrix, set_matrix
from groundup.adapt.whole import Whole
from groundup.errors import UserError

PREFIX = "base_model.model."  # what PEFT writes before the model's own names
ByLayer: TypeAlias = dict[str, dict[str, Tensor]]  # layer -> the name below it -> tensor


class Part(nn.Module, ABC):
    """One layer with what is learnt beside it."""

    base: nn.Module

    @abstractmethod
    def saved(self) -> dict[str, Tensor]:
        """PEFT's name below the layer's -> tensor, detached."""

    @abstractmethod
    def change(self, weight_ED: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What must be added to the base's matrix and bias for it to compute what this part does, fp32."""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved` gave. Here: that is the parameters themselves."""
        for name, own in self.saved().items():
            own.copy_(tensors[name])

    @property
    def weight(self) -> Tensor:
        """The one matrix that does what this part does, with gradients: a head is used by its matrix, not called."""
        weight_ED = matrix(self.base).float()
        return weight_ED + self.change(weight_ED, None)[0]

    @property
    def bias(self) -> Tensor | None:
        bias_E = _bias(self.base)
        if bias_E is None:
            return None
        change_E = self.change(matrix(self.base).float(), bias_E)[1]
        return bias_E if change_E is None else bias_E + change_E


class AdaptedLayers(Adapted):
    """An adapter that stands in the places of layers. parts: by the layers' names."""

    def __init__(self, model: nn.Module, parts: Mapping[str, Part], whole: Whole) -> None:
        super().__init__(model)
        self.parts, self.whole = dict(parts), whole
        for path, part in self.parts.items():
            self.put(model, path, part.train(part.base.training))

    def tensors(self) -> dict[str, Tensor]:
        parts = {f"{path}.{name}": t for path, part in self.parts.items() for name, t in part.saved().items()}
        return {PREFIX + name: tensor for name, tensor in (parts | self.whole.tensors()).items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        own = self.tensors()
        if own.keys() != tensors.keys():
            lacking, strange = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
            why = f"lacks {lacking[0]}" if lacking else f"holds {strange[0]}, which this model has not"
            raise UserError("adapter", why, "use an adapter made with the same settings on the same model")
        for name, tensor in tensors.items():
            check_shape(name, tensor, tuple(own[name].shape))
        for path, part in self.parts.items():
            part.load({name: tensors[f"{PREFIX}{path}.{name}"] for name in part.saved()})
        self.whole.load({name: tensors[PREFIX + name] for name in self.whole.tensors()})

    def merge(self) -> None:
        for path, part in self.parts.items():
            refuse_quantised(path, part.base)
        for part in self.parts.values():
            add_change(part)
        self.release()
        self.model.requires_grad_(True)

    def release(self) -> None:
        """Put the layers back as they were; the parts stay whole beside them."""
        for path, part in self.parts.items():
            self.put(self.model, path, part.base)

    def keep_start(self) -> None:
        self.whole.keep_start()

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        self.release()
        try:
            with self.whole.as_at_start():
                yield self.model
        finally:
            for path, part in self.parts.items():
                self.put(self.model, path, part)

    @staticmethod
    def put(model: nn.Module, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(inside(model).get_submodule(parent), name, module)

    def settings(self) -> dict[str, Any]:
        return {"peft_type": self.peft_type} | self.whole.settings()


@torch.no_grad()
def add_change(part: Part) -> None:
    """Put what a part does into its base, summed in fp32 and rounded once."""
    weight_ED, bias_E = matrix(part.base).float(), _bias(part.base)
    change_ED, change_E = part.change(weight_ED, bias_E)
    set_matrix(part.base, weight_ED + change_ED, None if bias_E is None or change_E is None else bias_E + change_E)


def _bias(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return None if bias is None else bias.detach().float()


def refuse_quantised(path: str, base: nn.Module) -> None:
    if hasattr(base, "dequantize"):
        why = "is quantised: rounded again it would lose what was learnt"
        raise UserError(path, why, "merge into the unquantised base: groundup merge BASE ADAPTER")


def by_layer(tensors: Mapping[str, Tensor], names: Collection[str]) -> tuple[ByLayer, dict[str, Tensor]]:
    """The tensors of a file whose names end in one of `names`, layer by layer, and the others (modules saved whole)."""
    layers: ByLayer = {}
    others: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        path = re.sub(r"\.default(?=\.weight$|$)", "", full.removeprefix(PREFIX))  # a name that old files still carry
        name = next((name for name in names if path.endswith("." + name)), None)
        if name is not None:
            layers.setdefault(path.removesuffix("." + name), {})[name] = tensor
        elif ".original_module." not in path:  # after a resize PEFT writes a module twice, and what it was before
            others[path.replace(".modules_to_save.", ".")] = tensor
    if not layers:
        raise UserError("adapter", "its file changes no layer", "train it again, or name another folder")
    return layers, others


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        why = f"{name.removeprefix(PREFIX)} is {tuple(tensor.shape)}, this model's is {wanted}"
        raise UserError("adapter", why, "use an adapter of this model")


def layer_of(layers: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The model's layer that a file names. UserError: it has none."""
    if path not in layers:
        raise UserError("adapter", f"{path} changes nothing that this model has", "use an adapter of this model")
    return layers[path]
