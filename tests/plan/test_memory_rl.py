"""The estimate knows of the models that reinforcement keeps beside the policy."""

from __future__ import annotations

from typing import Any

import pytest
from test_memory import BASE

from groundup.config import Recipe, build_recipe
from groundup.model.presets import preset
from groundup.plan.memory import estimate


def recipe_of(stage: str, rl: dict[str, Any], **more: Any) -> Recipe:
    train = {"batch_size": 2, "seq_len": 512, "dtype": "fp32"}
    return build_recipe({**BASE, "stage": stage, "model": "tiny", "train": train, "rl": rl, **more})


def test_a_reference_is_counted_where_there_is_one() -> None:
    without, held = (estimate(preset("tiny"), recipe_of("grpo", {"beta": beta})) for beta in (0.0, 0.1))
    assert without["reference"] == 0 and held["reference"] == held["weights"]
    assert held["total"] == without["total"] + held["weights"]
    lora = recipe_of("grpo", {"beta": 0.1}, adapt={"method": "lora"})
    assert estimate(preset("tiny"), lora)["reference"] == 0, "it is the model without its adapter"


@pytest.mark.parametrize("part", ["weights", "gradients", "optimizer", "activations"])
def test_a_value_model_of_its_own_is_a_second_model(part: str) -> None:
    own, shared = (estimate(preset("tiny"), recipe_of("ppo", {"value_model": name})) for name in ("copy", "shared"))
    assert own[part] == 2 * shared[part]
    assert own["total"] > 1.8 * shared["total"] - 2 * shared["reference"] - shared["logits"]


def test_the_value_model_of_a_lora_policy_shares_its_base() -> None:
    told = {"method": "lora", "rank": 4}
    own, shared = (
        estimate(preset("tiny"), recipe_of("ppo", {"value_model": name}, adapt=told)) for name in ("copy", "shared")
    )
    assert own["weights"] - shared["weights"] == shared["gradients"] < 0.1 * shared["weights"]
