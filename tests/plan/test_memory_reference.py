"""The estimate knows of the frozen copy that preference training keeps, and of the cases in which there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_memory import BASE

from groundup.adapt.build import adapt
from groundup.config import Recipe, build_recipe
from groundup.model.presets import preset
from groundup.model.transformer import Transformer
from groundup.plan.memory import estimate
from groundup.train.reference import frozen_copy


def recipe_of(preference: dict[str, Any], told: dict[str, Any], dtype: str = "fp32") -> Recipe:
    train = {"batch_size": 2, "seq_len": 64, "dtype": dtype}
    values = {**BASE, "stage": "preference", "model": "tiny", "train": train, "adapt": told, "preference": preference}
    return build_recipe(values)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("told", [{}, {"method": "freeze", "last": 1}], ids=["full", "last layer"])
def test_a_copy_is_counted(told: dict[str, Any], dtype: str) -> None:
    recipe = recipe_of({}, told, dtype)
    model = Transformer(preset("tiny"))
    adapt(model, recipe.adapt, seed=0)
    copied = frozen_copy(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
    own = {id(p) for p in model.parameters()}
    held = sum(p.nbytes for p in copied.parameters() if id(p) not in own)
    estimated, without = (estimate(preset("tiny"), one) for one in (recipe, recipe_of({"loss": "simpo"}, told, dtype)))
    assert estimated["reference"] == held > 0
    assert without["reference"] == 0
    assert estimated["total"] - without["total"] == held


@pytest.mark.parametrize("preference", [{"reference": "cached"}, {"reference": "none"}, {"loss": "orpo"}])
def test_no_copy_is_not_counted(preference: dict[str, Any]) -> None:
    assert estimate(preset("tiny"), recipe_of(preference, {}))["reference"] == 0


def test_below_an_adapter_there_is_no_second_model() -> None:
    assert estimate(preset("tiny"), recipe_of({}, {"method": "lora"}))["reference"] == 0
    assert estimate(preset("tiny"), recipe_of({"reference": "copy"}, {"method": "lora"}))["reference"] > 0
