"""Freeze and full: which parameters move, and that nothing else does."""

from __future__ import annotations

import pytest
import torch
from adapt_helpers import config

from groundup.adapt.build import adapt
from groundup.errors import UserError


def moving(model: torch.nn.Module, **settings: object) -> set[str]:
    """Names of what moves, layers shortened to `L0`, `L1`."""
    assert adapt(model, config("freeze", **settings), seed=0) is None
    return {
        f"L{name.split('.')[2]}" if ".layers." in f".{name}" or ".h." in name else name
        for name, p in model.named_parameters() if p.requires_grad
    }  # fmt: skip


def test_first_last_and_patterns(ours) -> None:
    assert moving(ours("qwen3"), first=1) == {"L0"}
    assert moving(ours("qwen3"), last=1) == {"L1"}
    assert moving(ours("gpt2"), last=1) == {"L1"}
    assert moving(ours("qwen3"), first=1, last=1) == {"L0", "L1"}
    assert moving(ours("qwen2"), train=["norm"]) == {"model.norm.weight"}
    assert moving(ours("qwen2"), last=1, train="norm,lm_head") == {"L1", "model.norm.weight", "lm_head.weight"}
    assert moving(ours("qwen2"), save=["embed_tokens"]) == {"model.embed_tokens.weight"}
    assert moving(ours("qwen3"), train=["lm_head"]) == {"model.embed_tokens.weight"}  # tied
    assert moving(ours("gpt2"), train=["lm_head"]) == {"transformer.wte.weight"}


def test_a_pattern_inside_layers(ours) -> None:
    model = ours("qwen3")
    moving(model, train=[r"layers\.1.*q_proj", "input_layernorm.weight"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    layernorms = {f"model.layers.{i}.input_layernorm.weight" for i in range(2)}
    assert names == {"model.layers.1.self_attn.q_proj.weight"} | layernorms


def test_only_they_get_gradients(ours, ids) -> None:
    model = ours("qwen2")
    moving(model, last=1)
    model(ids).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_full_moves_all(ours) -> None:
    model = ours("qwen3").requires_grad_(False)
    assert adapt(model, config("full"), seed=0) is None
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "adapt: freeze lets nothing move"),
        ({"first": 3}, "adapt.first: 3 layers of 2"),
        ({"train": ["norms"]}, "adapt.train: 'norms' describes no parameter of this model; did you mean norm?"),
        ({"train": ["norm("]}, "adapt.train: "),
        ({"last": 1, "base": "nf4"}, "adapt.base: a base in nf4 cannot move, and freeze moves it"),
    ],
)
def test_what_cannot_be(settings, says, ours) -> None:
    with pytest.raises(UserError) as caught:
        adapt(ours("qwen3"), config("freeze", **settings), seed=0)
    assert says in str(caught.value)
