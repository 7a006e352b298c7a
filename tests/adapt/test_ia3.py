"""(IA)^3: PEFT is the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapt_helpers import close, config, into_peft, logits, trained

from groundup.adapt.build import adapt
from groundup.errors import UserError

BASES = ["qwen3", "qwen2", "gpt2"]


@pytest.mark.parametrize("base", BASES)
def test_logits_and_gradients_are_peft_s(base, ours, stock, ids, tmp_path: Path) -> None:
    model = ours(base)
    adapted = trained(model, config("ia3"))
    theirs = into_peft(adapted, stock(base), tmp_path / "adapter", is_trainable=True)
    close(logits(model, ids), logits(theirs, ids))
    for one in (model, theirs):
        out = one(ids)
        getattr(out, "logits", out).log_softmax(-1)[..., 5].sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for path, part in adapted.parts.items():
        wanted = grads.pop(f"base_model.model.{path}.ia3_l.default").flatten()
        torch.testing.assert_close(part.scale.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert not grads


@pytest.mark.parametrize("base", BASES)
def test_starts_as_its_base_bit_for_bit(base, stock, ids) -> None:
    model = stock(base)
    before = logits(model, ids)
    adapt(model, config("ia3"), seed=0)
    assert torch.equal(logits(model, ids), before)


def test_the_places_of_the_paper(ours) -> None:
    adapted = adapt(ours("qwen2"), config("ia3"), seed=0)
    inputs = {path: part.feedforward for path, part in adapted.parts.items()}
    assert inputs == {
        f"model.layers.{i}.{name}": name == "mlp.down_proj"
        for i in range(2) for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    }  # fmt: skip
    assert sum(t.numel() for t in adapted.tensors().values()) == 2 * (32 + 32 + 128)
    gpt2 = adapt(ours("gpt2"), config("ia3"), seed=0)
    assert {path.split(".", 3)[-1]: part.feedforward for path, part in gpt2.parts.items()} == {
        "attn.c_attn": False,
        "mlp.c_proj": True,
    }


def test_places_of_ones_own(ours, stock, ids, tmp_path: Path) -> None:
    """A name that means both kinds of place, c_proj, is written out for PEFT."""
    model = ours("gpt2")
    adapted = trained(model, config("ia3", target=["c_proj"]))
    assert adapted.settings()["feedforward_modules"] == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    close(logits(model, ids), logits(into_peft(adapted, stock("gpt2"), tmp_path / "a"), ids))
    with pytest.raises(UserError, match="did you mean k_proj"):
        adapt(ours("qwen3"), config("ia3", target=["k_pro"]), seed=0)


def test_an_architecture_with_other_names_must_say_them() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for method in ("ia3", "bottleneck"):
        with pytest.raises(UserError, match=r"not known; name them; there are: 0"):
            adapt(model, config(method), seed=0)
