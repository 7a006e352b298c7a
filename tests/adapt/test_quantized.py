"""A frozen base in 4 or 8 bits: bitsandbytes' bytes, a gradient for what goes in, and half a byte a parameter."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from groundup.adapt.quantized import Int8Base, NF4Base, QuantizedBase, quantize_base
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.ops import quant_nf4
from groundup.ops.quant_nf4 import NF4, dequantize_nf4_, dynamic_levels, nf4_levels, quantize_nf4

WHY = "bitsandbytes is the reference for NF4"


def random(*shape, seed=0, scale=0.05):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def linear(outputs=96, inputs=128, bias=False, seed=0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer.weight.data = random(outputs, inputs, seed=seed)
    return layer


def model(**changes) -> Transformer:
    sizes = dict(vocab_size=61, hidden_size=128, intermediate_size=192, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, model_type="llama")
    made = Transformer(ModelConfig(**{**sizes, **heads, **changes}))
    made.init_weights(0)
    for block in made.blocks:  # these start at zero
        block.self_attn.o_proj.weight.data = random(*block.self_attn.o_proj.weight.shape, seed=1)
        block.mlp.down_proj.weight.data = random(*block.mlp.down_proj.weight.shape, seed=2)
    return made.requires_grad_(False)


# the format


def test_the_maps_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason=WHY)
    assert torch.equal(nf4_levels(), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_levels(), functional.create_dynamic_map())


def unlike_blocks(*shape):
    return random(*shape) * random(shape[0], 1, seed=1, scale=1.0).exp()


@pytest.mark.parametrize("shape", [(7, 64), (300, 192)])
def test_bytes_and_numbers_are_those_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional", reason=WHY)
    x = unlike_blocks(*shape)
    ours = quantize_nf4(x, double=False)
    packed, state = functional.quantize_4bit(x, quant_type="nf4")
    assert torch.equal(ours.codes.flatten(), packed.flatten())
    assert torch.equal(ours.tops, state.absmax)
    torch.testing.assert_close(ours.dequantize(), functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-9)


def test_scales_are_quantised_as_bitsandbytes_does():
    """On a CPU it finds their level by a table and misses the nearest now and then; on CUDA it does not."""
    functional = pytest.importorskip("bitsandbytes.functional", reason=WHY)
    x = unlike_blocks(3000, 192)
    ours = quantize_nf4(x)
    packed, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.codes.flatten(), packed.flatten())
    assert torch.equal(ours.second, state.state2.absmax) and torch.equal(ours.offset, state.offset)
    assert (ours.tops != state.absmax).float().mean() < 0.005
    exact = (quantize_nf4(x, double=False).tops - ours.offset) / ours.second.repeat_interleave(256)[:9000]
    error, theirs = ((exact - dynamic_levels()[codes.long()]).abs() for codes in (ours.tops, state.absmax))
    assert (error <= theirs + 1e-6).all()


def test_a_base_of_bitsandbytes_is_read():
    functional = pytest.importorskip("bitsandbytes.functional", reason=WHY)
    x = random(40, 128)
    packed, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    theirs = NF4(packed.view(-1, 32), state.absmax, state.state2.absmax, state.offset, x.shape)
    torch.testing.assert_close(theirs.dequantize(), functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("double", [True, False])
def test_the_kernel_equals_the_plain_form(double, monkeypatch):
    x = random(130, 192)
    kept = quantize_nf4(x, double)
    out = torch.full(x.shape, torch.nan)
    torch.testing.assert_close(dequantize_nf4_(kept, out), kept.dequantize(), rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(quant_nf4, "native", lambda name: None)
    assert torch.equal(dequantize_nf4_(kept, torch.empty(x.shape)), kept.dequantize())


def test_a_whole_is_quantised_as_its_pieces(monkeypatch):
    x = random(300, 64)
    whole = quantize_nf4(x)
    monkeypatch.setattr(quant_nf4, "AT_ONCE", 7)
    assert torch.equal(quantize_nf4(x).codes, whole.codes)


def test_8_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason=WHY)
    layer = linear()
    layer.weight.data = layer.weight.half().float()  # bitsandbytes looks at halves
    codes, tops, _ = functional.int8_vectorwise_quant(layer.weight.half())
    ours = Int8Base(layer)
    assert (ours.q != codes).float().mean() < 1e-3  # a tie falls to another side now and then
    torch.testing.assert_close(ours.scale[:, 0], tops / 127)
    assert (ours.dequantize() - layer.weight).abs().max() <= ours.scale.max() * 0.5001


# the layer


@pytest.mark.parametrize("make", [NF4Base, Int8Base])
@pytest.mark.parametrize("bias", [True, False])
def test_a_base_computes_with_its_own_matrix_and_has_a_gradient(make, bias):
    layer = linear(bias=bias)
    base, x, slope = make(layer), random(5, 3, 128, seed=3, scale=1.0).requires_grad_(), random(5, 3, 96, seed=4)
    out = base(x)
    plain = F.linear(x, base.dequantize(), layer.bias)
    torch.testing.assert_close(out, plain)
    (ours,), (wanted,) = torch.autograd.grad(out, x, slope), torch.autograd.grad(plain, x, slope)
    torch.testing.assert_close(ours, wanted)
    error = (base.dequantize() - layer.weight).norm() / layer.weight.norm()
    assert 1e-3 < error < (0.12 if make is NF4Base else 0.02)


@pytest.mark.parametrize("make", [NF4Base, Int8Base])
def test_it_computes_in_the_type_of_what_goes_in(make):
    base, x = make(linear()), random(4, 128, seed=3, scale=1.0)
    assert base(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = base(x.requires_grad_())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), base(x), atol=0.02, rtol=0.05)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, base.dequantize().sum(0).expand(4, -1), atol=0.02, rtol=0.05)


def test_no_matrix_is_kept_between_the_passes():
    base, kept = NF4Base(linear(256, 256)), []
    x = random(4, 256, seed=3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        base(x).sum().backward()
    assert sum(kept) < 256 * 256


@pytest.mark.parametrize("make", [NF4Base, Int8Base])
def test_a_cast_of_the_model_leaves_the_scales_alone(make):
    base = make(linear(bias=True))
    before = base.dequantize()
    base.to(torch.bfloat16)
    assert torch.equal(base.dequantize(), before)
    assert base.bias.dtype == torch.bfloat16
    assert not base.state_dict().keys() - {"bias"}
    assert torch.equal(copy.deepcopy(base).dequantize(), before)


# the model


@pytest.mark.parametrize("kind, most", [("nf4", 0.6), ("int8", 1.1)])
def test_every_matrix_of_the_blocks_is_replaced_and_nothing_else(kind, most):
    full = model(hidden_size=512, intermediate_size=512)
    quantised = copy.deepcopy(full)
    quantize_base(quantised, kind)
    bases = {name: part for name, part in quantised.named_modules() if isinstance(part, QuantizedBase)}
    matrices = {name: part for name, part in full.named_modules() if isinstance(part, nn.Linear) and "layers" in name}
    assert bases.keys() == matrices.keys() and len(bases) == 14
    stored = sum(base.nbytes for base in bases.values())
    assert stored / sum(layer.weight.numel() for layer in matrices.values()) <= most
    assert torch.equal(quantised.head_weight, full.head_weight)
    ids = torch.arange(40).view(2, 20)
    for name, base in bases.items():
        full.get_submodule(name).weight.data = base.dequantize()
    torch.testing.assert_close(quantised(ids), full(ids), atol=1e-4, rtol=1e-4)


def test_plain_scales_cost_four_bits_more_a_block():
    twice, once = NF4Base(linear(256, 512)), NF4Base(linear(256, 512), double_quant=False)
    assert once.nbytes == 256 * 512 // 64 * (32 + 4)
    assert twice.nbytes == 256 * 512 // 64 * (32 + 1) + 256 * 512 // 64 // 256 * 4 + 4


def test_what_moves_stays_as_it_is():
    partly = model()
    partly.blocks[1].mlp.down_proj.weight.requires_grad_(True)
    quantize_base(partly, "nf4")
    assert type(partly.blocks[1].mlp.down_proj) is nn.Linear
    assert type(partly.blocks[1].mlp.up_proj) is NF4Base


def test_a_layer_whose_bias_moves_stays_as_it_is():
    partly = model(attention_bias=True)
    partly.blocks[0].self_attn.q_proj.bias.requires_grad_(True)
    quantize_base(partly, "nf4")
    assert type(partly.blocks[0].self_attn.q_proj) is nn.Linear
    assert type(partly.blocks[0].self_attn.k_proj) is NF4Base


def test_a_width_that_is_no_multiple_of_the_block_is_refused_with_its_layer():
    odd = model(intermediate_size=200)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj: 200 inputs are no multiple of 64"):
        quantize_base(odd, "nf4")
    assert type(odd.blocks[0].self_attn.q_proj) is nn.Linear  # nothing was changed
    quantize_base(odd, "int8")
    assert type(odd.blocks[0].mlp.down_proj) is Int8Base


def test_a_model_that_moves_as_a_whole_has_no_base():
    with pytest.raises(UserError, match="no frozen"):
        quantize_base(model().requires_grad_(True), "nf4")
