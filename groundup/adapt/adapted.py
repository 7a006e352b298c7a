"""A model of which only a part moves, and what of it goes to disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Adapted(ABC):
    """Changes made to `model`, in place: its frozen weights do not require gradients, those of the adapter do.

    Files are PEFT's: `settings` is adapter_config.json (peft_type and what goes with it), `tensors` is
    adapter_model.safetensors, under PEFT's names.
    """

    peft_type: str
    mergeable = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by PEFT's names, modules that were trained whole included."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave. UserError: a name or a shape that this model has not."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """adapter_config.json but for the name of the base."""

    def merge(self) -> None:
        """Put the change into the model's own weights, which are then a plain model's again. UserError where the kind
        of adapter, or a quantised base, does not allow it."""
        raise NotImplementedError

    def rates(self) -> dict[str, float]:
        """Parameter name -> factor on the learning rate, where it is not 1 (LoRA+)."""
        return {}

    def keep_start(self) -> None:  # noqa: B027  # a soft prompt has nothing to remember
        """Before training: remember what `off` could not find again."""

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """The model without the adapter, while the context lasts: what it was before training (after `keep_start`)."""
        yield self.model

    def forward_model(self) -> nn.Module:
        """What stages compute with: the model itself, or one that puts a soft prompt before every document."""
        return self.model
