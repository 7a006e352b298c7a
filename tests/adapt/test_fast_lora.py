"""The fast block with frozen matrices computes what the plain one does, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groundup.adapt.lora import LoraLinear
from groundup.adapt.quantized import quantize_base
from groundup.model.config import ModelConfig
from groundup.model.fast import can_be_fast
from groundup.model.fast_lora import is_frozen
from groundup.model.rows import Rows
from groundup.model.transformer import Transformer
from groundup.ops import lora as lora_ops
from groundup.ops import norm as norm_ops
from groundup.ops import swiglu as swiglu_ops
from groundup.ops.loss import linear_cross_entropy
from groundup.ops.native import native

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DOCS = torch.arange(40).div(13, rounding_mode="floor").int().expand(5, -1)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def adapted(targets=ALL, dropout=0.0, rank=4, **changes) -> Transformer:
    """A frozen random model with LoRA beside the named matrices, B no longer at zero."""
    sizes = dict(vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = Transformer(ModelConfig(**{**sizes, **heads, **changes})).requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(random(*parameter.shape, seed=number, scale=0.2) + (parameter.ndim == 1))
    for number, block in enumerate(model.blocks):
        for name in targets:
            parent = block.self_attn if hasattr(block.self_attn, name) else block.mlp
            layer = getattr(parent, name)
            a, b = random(rank, layer.in_features, seed=90 + number), random(layer.out_features, rank, seed=80 + number)
            setattr(parent, name, LoraLinear(layer, a * 0.1, b * 0.1, 1.5, dropout))
    return model.train()


def is_fast(model: Transformer) -> bool:
    return can_be_fast(model.blocks, model.config, torch.device("cpu"), DOCS.numel())


def both_ways(model: Transformer, ids: torch.Tensor, docs: torch.Tensor | None):
    """(loss, gradients) of the fast and of the plain blocks."""
    found = []
    for fast in (True, False):
        x_BTD = model.model.embed_tokens(ids)
        rows = model._rows(x_BTD, None, docs, None)
        assert rows.fast is not None
        rows = rows if fast else Rows(rows.rope, rows.mask)
        for block in model.blocks:
            x_BTD = block(x_BTD, rows)
        loss = linear_cross_entropy(model.model.norm(x_BTD), model.head_weight, ids.roll(-1, 1))
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, moving.values()) if moving else ()
        found.append((loss, dict(zip(moving, grads, strict=True))))
    return found


def assert_alike(model: Transformer, docs: torch.Tensor | None = DOCS) -> None:
    ids = torch.randint(0, 61, DOCS.shape, generator=torch.Generator().manual_seed(2))
    (loss, grads), (wanted_loss, wanted) = both_ways(model, ids, docs)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-3 * wanted[name].abs().max().item(), msg=name)


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_loss_and_gradients_equal_the_plain_blocks(model_type, docs):
    model = adapted(model_type=model_type)
    assert all(is_frozen(block) for block in model.blocks)
    assert_alike(model, docs)


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("down_proj",), ("k_proj", "o_proj", "up_proj")])
def test_any_choice_of_matrices(targets):
    model = adapted(targets)
    assert is_fast(model)
    assert_alike(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind):
    model = adapted()
    quantize_base(model, kind)
    assert is_fast(model)
    assert_alike(model)


def test_chunks_of_tokens_add_up(monkeypatch):
    model = adapted()
    monkeypatch.setattr(lora_ops, "TOKENS", 7)
    assert_alike(model)


def test_without_a_compiler_plain_operators_compute_the_same(monkeypatch):
    model = adapted()
    for module in (norm_ops, swiglu_ops):
        monkeypatch.setattr(module, "native", lambda name: None)
    assert_alike(model)


def test_kernels_equal_the_plain_forms(monkeypatch):
    if native("train") is None:
        pytest.skip("no C compiler here")
    wide, grad, x, beside = random(9, 34), random(9, 17, seed=1), random(9, 21, seed=2), random(9, 21, seed=3)

    def everything():
        x_hat, rstd = norm_ops.normalize(x, 1e-5)
        back = norm_ops.residual_backward_(beside.clone(), x_hat, rstd, x)
        return [x_hat, rstd, back, swiglu_ops.swiglu_rows(wide), *swiglu_ops.swiglu_rows_backward(wide, grad)]

    fast = everything()
    for module in (norm_ops, swiglu_ops):
        monkeypatch.setattr(module, "native", lambda name: None)
    for a, b in zip(fast, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_moves_gets_its_gradient():
    model = adapted(tie_word_embeddings=False)
    model.model.embed_tokens.weight.requires_grad_(True)
    assert_alike(model)


def test_blocks_that_move_stand_beside_frozen_ones():
    model = adapted(())
    model.blocks[1].requires_grad_(True)
    assert [is_frozen(block) for block in model.blocks] == [True, False]
    assert is_fast(model)
    assert_alike(model)


def test_what_pissa_began_with_is_no_part_of_the_gradient():
    model = adapted()
    part = model.blocks[0].mlp.up_proj
    model.blocks[0].mlp.up_proj = LoraLinear(
        part.base, part.a.data, part.b.data, 1.5, start=(part.a.data * 0.5, part.b.data * 0.5)
    )
    assert is_fast(model)
    assert_alike(model)


def test_it_steps_aside_for_what_it_does_not_compute():
    assert is_fast(adapted())
    dropping = adapted(dropout=0.1)
    assert not is_fast(dropping)
    assert is_fast(dropping.eval())  # nothing is dropped there
    dora = adapted()
    dora.blocks[0].mlp.up_proj.magnitude = nn.Parameter(torch.ones(128))
    assert not is_fast(dora)
    hooked = adapted()
    hooked.blocks[1].self_attn.q_proj.base.register_forward_hook(lambda *_: None)
    assert not is_fast(hooked)
    other = adapted()
    other.blocks[1].mlp.up_proj = nn.Sequential(other.blocks[1].mlp.up_proj)
    assert not is_fast(other)
    moving = adapted()
    moving.blocks[0].input_layernorm.weight.requires_grad_(True)
    assert not is_fast(moving)


def test_no_matrix_of_the_base_is_kept_for_the_backward_pass():
    model = adapted()
    ids = torch.zeros(1, 4, dtype=torch.long)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.hidden(ids).sum().backward()
    assert max(kept.values()) < 64 * 64  # the smallest matrix with its copies


def test_a_frozen_head_costs_no_gradient_of_it():
    weight, hidden = random(50, 16), random(6, 16, seed=1).requires_grad_()
    labels, kept = torch.arange(6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels).backward()
    assert max(kept) < weight.numel()
