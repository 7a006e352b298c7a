"""The estimate where only a part moves, and where transformers computes: against what a step really allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import save_stock
from test_memory import BASE, live_peak

from groundup.adapt.build import adapt
from groundup.config import Recipe, build_recipe
from groundup.errors import UserError
from groundup.model.config import num_parameters
from groundup.model.flops import Flops, lowest_moving
from groundup.model.io import load_model, read_config
from groundup.model.presets import preset
from groundup.model.transformer import Transformer
from groundup.plan.memory import estimate, plan_recipe

WIDE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 3000, "max_position_embeddings": 512}


def recipe_of(model: str = "tiny", adapt: dict[str, Any] | None = None, **train: Any) -> Recipe:
    return build_recipe({**BASE, "stage": "sft", "model": model, "train": train, "adapt": adapt or {}})


def adapted(recipe: Recipe, model: Any) -> Any:
    found = adapt(model, recipe.adapt, seed=0)
    return model if found is None else found.forward_model()


@pytest.mark.parametrize(
    "told",
    [
        {"method": "lora"},
        {"method": "lora", "target": ["q_proj", "v_proj"], "rank": 4},
        {"method": "freeze", "last": 1},
        {"method": "prompt", "tokens": 8},
    ],
    ids=["lora", "lora of two", "last layer", "prompt"],
)
def test_where_a_part_moves(told: dict[str, Any]) -> None:
    recipe = recipe_of(adapt=told, batch_size=3, seq_len=128)
    estimated = estimate(preset("tiny"), recipe)
    measured = live_peak(recipe, adapted(recipe, Transformer(preset("tiny"))))
    assert 0.9 <= estimated["total"] / measured <= 1.15, f"{estimated['total'] / 1e6:.1f} of {measured / 1e6:.1f} MB"
    assert estimated["total"] < estimate(preset("tiny"), recipe_of(batch_size=3, seq_len=128))["total"]


@pytest.mark.parametrize(
    "name, changes, told",
    [
        ("opt", {**WIDE, "ffn_dim": 512, "word_embed_proj_dim": 128}, {}),
        ("gpt2", {"n_embd": 128, "n_layer": 4, "vocab_size": 3000}, {}),
        ("mixtral", {**WIDE, "intermediate_size": 128}, {}),
        ("opt", {**WIDE, "ffn_dim": 512, "word_embed_proj_dim": 128}, {"method": "lora"}),
    ],
    ids=["opt", "gpt2", "mixtral", "opt-lora"],
)
def test_what_transformers_computes(name: str, changes: dict[str, Any], told: dict[str, Any], tmp_path: Path) -> None:
    save_stock(name, tmp_path, **changes)
    recipe = recipe_of(str(tmp_path), told, batch_size=2, seq_len=128)
    config, model = read_config(tmp_path), load_model(tmp_path)
    estimated, measured = estimate(config, recipe), live_peak(recipe, adapted(recipe, model).train())
    assert 0.9 <= estimated["total"] / measured <= 1.15, f"{estimated['total'] / 1e6:.1f} of {measured / 1e6:.1f} MB"
    assert estimated["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert estimated["gradients"] == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parts_that_are_counted_exactly() -> None:
    """What moves, by the same rules as the adapters' own; a frozen base in fewer bits."""
    recipe = recipe_of(adapt={"method": "lora", "rank": 4}, ema=0.99)
    model = Transformer(preset("tiny"))
    base = 4 * sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    moving = 4 * sum(p.numel() for p in adapted(recipe, model).parameters() if p.requires_grad)
    parts = estimate(preset("tiny"), recipe)
    assert [parts[name] for name in ("weights", "gradients", "optimizer", "ema")] == [
        base + moving, moving, 2 * moving, moving,
    ]  # fmt: skip
    for kind, double, each in (("nf4", True, 0.5 + 1 / 64 + 1 / 4096), ("nf4", False, 0.5625), ("int8", True, None)):
        told = {"method": "lora", "rank": 4, "base": kind, "double_quant": double}
        saved = parts["weights"] - estimate(preset("tiny"), recipe_of(adapt=told))["weights"]
        assert saved == pytest.approx(matrices * (4 - (each or 1.0)), rel=0.02 if each is None else 1e-4)


def test_what_does_not_fit_the_model_is_said_before_anything_is_read() -> None:
    with pytest.raises(UserError, match=r"adapt\.target: 'w_proj' describes no linear layer"):
        estimate(preset("tiny"), recipe_of(adapt={"method": "lora", "target": ["w_proj"]}))
    deep = {"method": "lora", "target": ["layers.3.*q_proj"]}  # a layer that the small models tried out have not
    assert estimate(preset("tiny"), recipe_of(adapt=deep))["gradients"] == 4 * 8 * (128 + 128)


def test_the_estimate_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    estimate(preset("tiny"), recipe_of(adapt={"method": "p_tuning", "tokens": 5}))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_of_a_foreign_folder(tmp_path: Path) -> None:
    save_stock("opt", tmp_path / "model")
    recipe = recipe_of(str(tmp_path / "model"), {"method": "lora"}, device="cpu", seq_len=64)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    plan = plan_recipe(tmp_path / "r.yaml")
    assert plan["fits"] and plan["parameters"] == num_parameters(read_config(tmp_path / "model"))
    assert 0 < plan["trained_parameters"] < plan["parameters"] / 2


def test_operations_where_a_part_moves() -> None:
    """Of our own model all of it counts as before; with a LoRA a third less, but for what the adapter adds."""
    model = Transformer(preset("tiny"))
    whole = Flops.of(model, 128)
    assert whole(1000, 500) == pytest.approx(Flops(model.config, 128)(1000, 500), rel=2e-3)
    recipe = recipe_of(adapt={"method": "lora", "rank": 2})
    part = Flops.of(adapted(recipe, model), 128)
    assert lowest_moving(model) == 0
    assert 0.66 < part(1000, 500) / whole(1000, 500) < 0.8
