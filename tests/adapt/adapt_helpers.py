"""What the tests of adapters share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.adapt.adapted import Adapted
from groundup.adapt.build import adapt
from groundup.adapt.folder import save_adapter
from groundup.config import AdaptConfig

LORAS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True, "rank": 3},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
}


def config(method: str = "lora", **changed: Any) -> AdaptConfig:
    return AdaptConfig.model_validate({"method": method, "rank": 4, "alpha": 12, **changed})


def trained(model: torch.nn.Module, config: AdaptConfig, seed: int = 0) -> Adapted:
    """An adapter on `model`, as if it had been trained: all that moves got noise."""
    adapted = adapt(model, config, seed)
    assert adapted is not None
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def close(a: torch.Tensor, b: torch.Tensor, within: float = 1e-5) -> None:
    """Logits here are of size 1 to 10."""
    torch.testing.assert_close(a, b, rtol=within, atol=within)


def into_peft(adapted: Adapted, stock: Any, folder: Path, base: str = "base", **how: Any) -> Any:
    """What PEFT makes of our files, on transformers' model."""
    peft = pytest.importorskip("peft", reason="the reference")
    save_adapter(adapted, folder, base)
    return peft.PeftModel.from_pretrained(stock, str(folder), **how)
