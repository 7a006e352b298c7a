"""LoRA and its kin: what they compute, where they start, what moves; PEFT is the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapt_helpers import LORAS, close, config, into_peft, logits, trained

from groundup.adapt.build import adapt
from groundup.adapt.folder import load_adapter, save_adapter
from groundup.adapt.lora import Lora, LoraLinear
from groundup.errors import UserError
from groundup.infer.adapters import load_adapter as load_for_serving

BASES = ["qwen3", "qwen2", "gpt2"]


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("base", BASES)
def test_logits_and_gradients_are_peft_s(base, kind, ours, stock, ids, tmp_path: Path) -> None:
    """One step's gradients of A, B and lengths, from the same A and B."""
    model = ours(base)
    adapted = trained(model, config(**LORAS[kind]))
    theirs = into_peft(adapted, stock(base), tmp_path / "adapter", is_trainable=True)
    close(logits(model, ids), logits(theirs, ids))
    for one in (model, theirs):
        out = one(ids)
        getattr(out, "logits", out).log_softmax(-1)[..., 5].sum().backward()
    grads = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert isinstance(adapted, Lora)
    for path, part in adapted.parts.items():
        names = {"lora_A.weight": part.a, "lora_B.weight": part.b, "lora_magnitude_vector.weight": part.magnitude}
        for name, own in names.items():
            if own is not None:
                wanted = grads.pop(f"base_model.model.{path}.{name}")
                rank = len(own) if name.startswith("lora_A") else own.shape[-1]
                wanted = wanted[:rank] if name.startswith("lora_A") else wanted[..., :rank]  # pissa: twice the rank
                torch.testing.assert_close(own.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert not grads


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_peft_s(dora, ours, stock, ids, tmp_path: Path) -> None:
    """The same draws on the same inputs; none where the model answers."""
    model = ours("qwen2")
    adapted = trained(model, config(dora=dora, dropout=0.3))
    theirs = into_peft(adapted, stock("qwen2"), tmp_path / "adapter", is_trainable=True)
    answers = []
    for one in (model.train(), theirs.train()):
        torch.manual_seed(5)
        answers.append(logits(one, ids))
    close(*answers)
    quiet = logits(model.eval(), ids)
    assert (quiet - answers[0]).abs().max() > 1e-2
    close(quiet, logits(theirs.eval(), ids))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_starts_as_its_base_bit_for_bit(kind, stock, ids) -> None:
    model = stock("qwen2")
    before = logits(model, ids)
    adapt(model, config(**LORAS[kind]), seed=0)
    assert torch.equal(logits(model, ids), before)


def test_only_the_adapter_moves(ours, ids) -> None:
    model = ours("qwen3")
    adapted = adapt(model, config(target=["q_proj", "down_proj"], dora=True), seed=0)
    moving = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert set(moving) == {
        f"model.layers.{i}.{part}.{n}"
        for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj") for n in ("a", "b", "magnitude")
    }  # fmt: skip
    assert sum(moving.values()) == 2 * (4 * (64 + 64) + 64 + 4 * (128 + 64) + 64)
    assert sum(t.numel() for t in adapted.tensors().values()) == sum(moving.values())
    model(ids).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_what_is_drawn_depends_on_the_seed_alone(ours) -> None:
    def drawn(seed: int, elsewhere: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(elsewhere)
        adapted = adapt(ours("qwen3"), config(), seed)
        assert torch.initial_seed() == elsewhere
        return adapted.tensors()

    one, same, other = drawn(3, 0), drawn(3, 1), drawn(4, 0)
    assert all(torch.equal(one[name], same[name]) for name in one)
    a = [name for name in one if "lora_A" in name]
    assert a and not any(torch.equal(one[name], other[name]) for name in a)
    assert all(0.9 < one[name].abs().max() * one[name].shape[1] ** 0.5 <= 1 for name in a)
    assert not any(one[name].any() for name in one if "lora_B" in name)


@pytest.mark.parametrize("base", BASES)
def test_all_is_peft_s_all_linear(base, ours, stock) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    theirs = peft.get_peft_model(stock(base), peft.LoraConfig(target_modules="all-linear"))
    adapted = adapt(ours(base), config(target="all"), seed=0)
    assert list(adapted.parts) == theirs.base_model.targeted_module_names


def test_names_and_patterns(ours) -> None:
    def chosen(*target: str, base: str = "qwen2") -> list[str]:
        return list(adapt(ours(base), config(target=list(target)), seed=0).parts)

    assert chosen("q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert chosen("layers.[1].*[kv]_proj") == [f"model.layers.1.self_attn.{n}_proj" for n in "kv"]
    assert chosen("model.layers.0.mlp.up_proj", "lm_head") == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert len(chosen("all", "lm_head")) == 15
    assert chosen("mlp.c_proj", base="gpt2") == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("q_prj", "did you mean q_proj? there are: q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ("input_layernorm", "describes no linear layer"),
        ("proj", "describes no linear layer"),
        ("q_proj,layers.9", "'layers.9' describes no linear layer"),
        ("*proj", "is no pattern"),
        ("", "names nothing"),
    ],
)
def test_targets_that_match_nothing_are_listed(target, says, ours) -> None:
    with pytest.raises(UserError) as caught:
        adapt(ours("qwen3"), config(target=target), seed=0)
    assert caught.value.where == "adapt.target" and says in str(caught.value)


def test_lora_plus_moves_b_faster(ours) -> None:
    model = ours("qwen3")
    adapted = adapt(model, config(lr_ratio=16, target=["q_proj"]), seed=0)
    assert adapted.rates() == {f"model.layers.{i}.self_attn.q_proj.b": 16.0 for i in range(2)}
    assert adapted.rates().keys() <= dict(model.named_parameters()).keys()
    assert adapt(ours("qwen3"), config(), seed=0).rates() == {}
    foreign = ours("gpt2")
    names = adapt(foreign, config(lr_ratio=2, target=["c_fc"]), seed=0).rates()
    assert len(names) == 2 and names.keys() <= dict(foreign.named_parameters()).keys()


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_where_peft_s_does_and_fits_the_original_base(rslora, ours, stock, ids, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    model, plain = ours("qwen2"), logits(ours("qwen2"), ids)
    adapted = adapt(model, config(init="pissa", rslora=rslora), seed=0)
    close(logits(model, ids), plain)
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights="pissa", use_rslora=rslora
    )
    theirs = peft.get_peft_model(stock("qwen2"), settings)
    for path, part in adapted.parts.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        close(part.a.detach(), layer.lora_A.default.weight.detach())
        close(part.b.detach(), layer.lora_B.default.weight.detach())
        residual = part.base.weight - part.scale * part.start_b @ part.start_a
        close(residual.detach(), layer.base_layer.weight.detach())
    told = adapted.settings()
    assert (told["r"], told["init_lora_weights"]) == (8, True)
    assert told["lora_alpha"] / (8**0.5 if rslora else 8) == pytest.approx(part.scale)


def test_pissa_saved_and_gone_on_with_is_the_same_bits(ours, ids) -> None:
    model, again = ours("qwen3"), ours("qwen3")
    adapted = trained(model, config(init="pissa"))
    other = trained(again, config(init="pissa"), seed=1)
    for part in other.parts.values():  # another machine's decomposition: other signs
        part.start_a.neg_()
        part.start_b.neg_()
    other.load(adapted.tensors())
    assert torch.equal(logits(model, ids), logits(again, ids))
    for one in (model, again):
        one(ids).sum().backward()
    pairs = zip(adapted.parts.values(), other.parts.values(), strict=True)
    assert all(torch.equal(mine.a.grad, its.a.grad) for mine, its in pairs)


def test_pissa_needs_as_many_directions(ours) -> None:
    with pytest.raises(UserError, match=r"adapt.rank: pissa finds at most 32 directions in .*k_proj, not 40"):
        adapt(ours("qwen3"), config(init="pissa", rank=40), seed=0)
    with pytest.raises(UserError, match=r"adapt.init: pissa and dora"):
        adapt(ours("qwen3"), config(init="pissa", dora=True), seed=0)


def test_one_adapter_at_a_time(ours) -> None:
    model = ours("qwen3")
    adapt(model, config(), seed=0)
    with pytest.raises(UserError, match="has an adapter already"):
        adapt(model, config(), seed=0)


def test_half_precision_base_under_fp32_adapter(ours, ids) -> None:
    """A bf16 base answers in bf16 whatever the adapter is kept in, with autocast and without."""
    model = ours("qwen3").bfloat16()
    adapted = trained(model, config(dora=True))
    part = adapted.parts["model.layers.0.mlp.up_proj"]
    assert part.a.dtype == part.magnitude.dtype == torch.float32
    x_D = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = part(x_D)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = part(x_D)
    assert plain.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(plain, mixed, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", LORAS)
def test_on_a_quantised_base(kind, ours, ids) -> None:
    """QLoRA: the adapter stands on what the quantised layer computes, and merging asks for the other base."""
    model, plain = ours("qwen3"), ours("qwen3")
    adapted = trained(model, config(base="nf4", **LORAS[kind]))
    for path, part in adapted.parts.items():
        assert hasattr(part.base, "dequantize")
        plain.get_submodule(path).weight.data = part.base.dequantize()
    other = adapt(plain, config(**LORAS[kind]), seed=5)
    other.load(adapted.tensors())
    close(logits(model, ids), logits(plain, ids), 1e-4)
    with pytest.raises(UserError, match="merge into the unquantised base"):
        adapted.merge()


def test_embeddings_saved_with_the_adapter_are_not_quantised(ours) -> None:
    model = ours("qwen2")
    adapted = adapt(model, config(base="int8", save=["lm_head", "k_proj"]), seed=0)
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.requires_grad
    assert type(model.blocks[0].self_attn.k_proj) is torch.nn.Linear
    assert "model.layers.0.self_attn.k_proj" not in adapted.parts and len(adapted.parts) == 12


def test_serving_reads_ranks_scales_and_refuses_what_it_cannot_do(ours, stock, ids, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_rslora=True, init_lora_weights=False,
        rank_pattern={"up_proj": 2}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 5},
    )  # fmt: skip
    theirs = peft.get_peft_model(stock("qwen3"), settings).eval()
    theirs.save_pretrained(tmp_path / "peft")
    model = ours("qwen3")
    served = load_for_serving("x", tmp_path / "peft", model)
    assert len(served.parts) == 4
    for path, layer in model.named_modules():
        if layer in served.parts:
            a, b = served.parts[layer]
            close(b @ a, theirs.get_submodule(f"base_model.model.{path}").get_delta_weight("default").detach())
    for name, changed in {"dora": {"dora": True}, "whole": {"save": ["embed_tokens"]}}.items():
        save_adapter(trained(ours("qwen3"), config(**changed)), tmp_path / name, "base")
        with pytest.raises(UserError, match="groundup merge BASE ADAPTER"):
            load_for_serving("x", tmp_path / name, model)
    save_adapter(trained(ours("qwen2"), config(target=["lm_head"])), tmp_path / "head", "base")
    with pytest.raises(UserError, match="lm_head changes nothing"):
        load_for_serving("x", tmp_path / "head", ours("qwen2"))
    save_adapter(trained(ours("gpt2"), config()), tmp_path / "gpt2", "base")
    with pytest.raises(UserError, match=r"c_attn is no nn\.Linear"):
        load_for_serving("x", tmp_path / "gpt2", ours("gpt2"))


def test_an_adapted_head_is_part_of_head_weight(ours, stock, ids, tmp_path: Path) -> None:
    """Losses take the head as a matrix: an adapter on it must be in that, with its gradients."""
    for kind in ({}, {"dora": True}):
        model = ours("qwen2")
        adapted = trained(model, config(target=["lm_head"], **kind))
        theirs = into_peft(adapted, stock("qwen2"), tmp_path / f"head{len(kind)}", is_trainable=True)
        close(logits(model, ids), logits(theirs, ids))
        for one in (model, theirs):
            out = one(ids)
            getattr(out, "logits", out).square().sum().backward()
        head = adapted.parts["lm_head"]
        assert isinstance(head, LoraLinear)
        wanted = theirs.base_model.model.lm_head.lora_A.default.weight.grad
        torch.testing.assert_close(head.a.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_an_adapted_head_parts_a_tied_one(ours, stock, ids, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    settings = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(stock("qwen3"), settings).eval()
    theirs.save_pretrained(tmp_path / "peft")
    model = ours("qwen3")
    adapted = load_adapter(model, tmp_path / "peft")
    close(logits(model, ids), logits(theirs, ids))
    adapted.merge()
    close(logits(model, ids), logits(theirs, ids))
    assert not model.config.tie_word_embeddings
    head = ours("qwen3")
    with torch.no_grad():
        head.head_weight[5] += 1  # PEFT saved the head that it adapted, too
    with pytest.raises(UserError, match=r"lm_head.base_layer.weight is not this model's"):
        load_adapter(head, tmp_path / "peft")
