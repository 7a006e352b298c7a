"""The fast block computes what block.py says, and steps aside whenever something has hold of a part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groundup.model.config import ModelConfig
from groundup.model.fast import can_be_fast
from groundup.model.rows import Rows
from groundup.model.transformer import Transformer

CPU = torch.device("cpu")
ENOUGH = 192  # tokens at once that make copies of matrices 64 wide worth their while
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def random_model(**changes) -> Transformer:
    sizes = dict(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = Transformer(ModelConfig(**{**sizes, **heads, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    return model


def is_fast(model: Transformer) -> bool:
    return can_be_fast(model.blocks, model.config, CPU, ENOUGH)


def rows_of(model: Transformer, ids: torch.Tensor, docs: torch.Tensor | None) -> Rows:
    return model._rows(model.model.embed_tokens(ids), None, docs, None)


@pytest.mark.parametrize("docs", [None, torch.arange(40).div(13, rounding_mode="floor").int().expand(5, -1)])
@pytest.mark.parametrize("rope_scaling", [None, YARN])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_fast_and_plain_blocks_agree(model_type, rope_scaling, docs):
    model = random_model(model_type=model_type, rope_scaling=rope_scaling)
    x = torch.randn(5, 40, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    fast = rows_of(model, torch.zeros(5, 40, dtype=torch.long), docs)
    assert fast.fast is not None
    plain = Rows(fast.rope, fast.mask)
    block = model.blocks[0]
    inputs = (x, *block.parameters())
    outs = [block(x, rows) for rows in (fast, plain)]
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
    slope = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(3))
    names = ["x", *dict(block.named_parameters())]
    grads = [torch.autograd.grad(out, inputs, slope) for out in outs]
    for name, a, b in zip(names, *grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3, msg=name)


def test_an_untouched_fp32_model_is_fast():
    assert is_fast(random_model())
    assert not is_fast(random_model(model_type="llama", attention_bias=True))
    assert not is_fast(random_model(model_type="llama", mlp_bias=True))
    assert not is_fast(random_model().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fast(random_model())


def test_few_tokens_are_not_worth_copies_of_matrices():
    """A token less is computed by block.py itself, to the same numbers."""
    model = random_model()
    many = torch.randint(0, 61, (1, ENOUGH), generator=torch.Generator().manual_seed(5))
    assert rows_of(model, many, None).fast is not None
    assert rows_of(model, many[:, 1:], None).fast is None
    torch.testing.assert_close(model(many)[:, :-1], model(many[:, :-1]), atol=1e-4, rtol=1e-4)


def test_an_adapter_or_a_hook_is_never_bypassed():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    ids = torch.zeros(ENOUGH // 8, 8, dtype=torch.long)
    model = random_model()
    before = model(ids)
    layer = model.blocks[1].mlp
    doubled = Doubled(96, 64, bias=False)
    doubled.weight = layer.down_proj.weight
    layer.down_proj = doubled
    assert not is_fast(model)
    assert not torch.allclose(model(ids), before)

    hooked, seen = random_model(), []
    hooked.blocks[0].self_attn.k_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(hooked(ids), before, atol=1e-4, rtol=1e-4)
    assert seen

    around = random_model()
    around.blocks[0].register_forward_hook(lambda *_: seen.append(2))  # on the block itself: fast, and still called
    assert is_fast(around)
    around(ids)
    assert seen[-1] == 2


def test_frozen_parameters_stay_without_gradient():
    model = random_model()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    model(torch.zeros(ENOUGH // 8, 8, dtype=torch.long)).sum().backward()
    assert all(p.grad is None for p in model.blocks[0].parameters())
    assert all(p.grad is not None for p in model.blocks[1].parameters())


def test_gradients_lie_in_memory_as_their_parameters():
    """Fused optimizers and gradient buckets want it; inside, gradients of matrices are made transposed."""
    model = random_model()
    model(torch.zeros(ENOUGH // 8, 8, dtype=torch.long)).sum().backward()
    assert all(p.grad.is_contiguous() for p in model.parameters())


@pytest.mark.slow
def test_compiled_blocks_agree():
    model = random_model()
    ids = torch.randint(0, 61, (ENOUGH // 32, 32), generator=torch.Generator().manual_seed(4))
    docs = torch.arange(32).div(13, rounding_mode="floor").int().expand(len(ids), -1)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, None, docs).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    eager = gradients()
    model.compile_blocks()
    assert not is_fast(model)
    for a, b in zip(eager, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
