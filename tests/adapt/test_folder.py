"""Adapter folders: ours load in PEFT, PEFT's in ours; what is not ours is refused in a line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_helpers import LORAS, close, config, into_peft, logits, trained
from safetensors.torch import load_file, save_file

from groundup.adapt.build import adapt
from groundup.adapt.folder import base_of, is_adapter, load_adapter, save_adapter
from groundup.errors import UserError

KINDS = {**{kind: ("lora", changed) for kind, changed in LORAS.items()}, "ia3": ("ia3", {})}
BASES = ["qwen3", "qwen2", "gpt2"]


def peft_made(stock: Any, folder: Path, **settings: Any) -> Any:
    """PEFT's own adapter with noise in it, saved; returns its model."""
    peft = pytest.importorskip("peft", reason="the reference")
    kind = peft.IA3Config if "feedforward_modules" in settings else peft.LoraConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(stock, kind(task_type="CAUSAL_LM", **settings)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_ours_in_peft(base, kind, ours, stock, ids, tmp_path: Path) -> None:
    method, changed = KINDS[kind]
    model = ours(base)
    theirs = into_peft(trained(model, config(method, **changed)), stock(base), tmp_path / "a")
    close(logits(model, ids), logits(theirs, ids))
    assert (logits(model, ids) - logits(ours(base), ids)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("base", "target", "named"),
    [
        ("gpt2", ["mlp.c_proj"], [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]),
        ("qwen3", ["layers.1.*q_proj"], ["model.layers.1.self_attn.q_proj"]),
        ("qwen3", ["self_attn.*"], ["k_proj", "o_proj", "q_proj", "v_proj"]),
    ],
)
def test_peft_adapts_the_same_layers(base, target, named, ours, stock, tmp_path: Path) -> None:
    """A name that other layers have too is written in full."""
    adapted = trained(ours(base), config(target=target))
    theirs = into_peft(adapted, stock(base), tmp_path / "a")
    assert adapted.settings()["target_modules"] == named
    assert theirs.base_model.targeted_module_names == list(adapted.parts)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("qwen3", {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_rslora": True, "fan_in_fan_out": True}),
        ("qwen2", {"target_modules": r".*layers\.1\..*proj", "use_dora": True}),
        ("qwen2", {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_fc"], "init_lora_weights": "pissa", "fan_in_fan_out": True}),
        ("qwen3", {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "orthogonal", "r": 4}),
        (
            "qwen3",
            {
                "target_modules": ["q_proj", "up_proj"], "r": 8, "lora_alpha": 4, "layers_to_transform": [1],
                "rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 32},
            },
        ),
        ("qwen2", {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        (
            "gpt2",
            {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
        ),
        ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
        ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)  # fmt: skip
def test_peft_s_in_ours_and_back(base, settings, ours, stock, ids, tmp_path: Path) -> None:
    theirs = peft_made(stock(base), tmp_path / "peft", **settings)
    model = ours(base)
    adapted = load_adapter(model, tmp_path / "peft")
    close(logits(model, ids), logits(theirs, ids))
    moving = {p for p in model.parameters() if p.requires_grad}
    assert len(moving) == sum(p.requires_grad for p in theirs.parameters())
    close(logits(into_peft(adapted, stock(base), tmp_path / "back", "a/base"), ids), logits(theirs, ids))
    assert base_of(tmp_path / "back") == "a/base"


def test_pissa_that_peft_converted(ours, stock, ids, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(stock("qwen2"), settings).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter *= 1.1
    theirs.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = ours("qwen2")
    load_adapter(model, tmp_path / "peft")
    close(logits(model, ids), logits(theirs, ids))


@pytest.mark.parametrize("base", ["qwen3", "gpt2"])
@pytest.mark.parametrize("save", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_embedding_stays_one_in_ours_and_in_peft(base, save, ours, stock, ids, tmp_path: Path) -> None:
    model, again = ours(base), ours(base)
    adapted = trained(model, config(save=save))
    theirs = into_peft(adapted, stock(base), tmp_path / "a", is_trainable=True)
    close(logits(model, ids), logits(theirs, ids))
    root = theirs.base_model.model
    assert root.get_input_embeddings().weight is root.get_output_embeddings().weight
    loaded = load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert loaded.tensors().keys() == adapted.tensors().keys()
    assert again.config.tie_word_embeddings


@pytest.mark.parametrize("base", ["qwen3", "gpt2"])
@pytest.mark.parametrize("tying", [False, True])
def test_peft_s_of_a_tied_model(base, tying, ours, stock, ids, tmp_path: Path) -> None:
    """Unless told otherwise PEFT trains a copy of the embedding and leaves the head as it was: two matrices."""
    embedding, target = ("wte", "c_attn") if base == "gpt2" else ("embed_tokens", "q_proj")
    theirs = peft_made(
        stock(base), tmp_path / "peft", target_modules=[target], modules_to_save=[embedding], ensure_weight_tying=tying
    )
    model = ours(base)
    adapted = load_adapter(model, tmp_path / "peft")
    close(logits(model, ids), logits(theirs, ids))
    assert model.config.tie_word_embeddings == (tying and base == "qwen3")  # by its name PEFT knows no other embedding
    save_adapter(adapted, tmp_path / "again", "base")
    again = ours(base)
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_the_keys_are_peft_s(method, ours, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    save_adapter(adapt(ours("qwen3"), config(method), seed=0), tmp_path / "ours", "some/base")
    theirs = peft.LoraConfig(r=4, lora_alpha=12) if method == "lora" else peft.IA3Config()
    theirs.task_type = "CAUSAL_LM"
    theirs.save_pretrained(tmp_path / "peft")
    told, wanted = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "peft"))
    assert told.keys() == wanted.keys()
    differ = {key for key in wanted if told[key] != wanted[key]}
    assert differ <= {"base_model_name_or_path", "inference_mode", "target_modules", "feedforward_modules"}
    assert base_of(tmp_path / "ours") == "some/base"
    assert is_adapter(tmp_path / "ours") and not is_adapter(tmp_path)


def test_only_the_adapter_is_written_and_the_same_bytes_each_time(ours, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(trained(ours("qwen3"), config(target=["q_proj"])), tmp_path / name, "base")
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [p.name for p in one] == ["adapter_config.json", "adapter_model.safetensors"]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert one[1].stat().st_size < 4 * 2 * 4 * (64 + 64) + 1000


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "ia3"])
def test_taken_over_by_the_same_adapter(kind, ours, ids) -> None:
    method, changed = KINDS[kind]
    model, again = ours("qwen3"), ours("qwen3")
    adapted = trained(model, config(method, save=["embed_tokens"], **changed))
    other = adapt(again, config(method, save=["embed_tokens"], **changed), seed=9)
    other.load(adapted.tensors())
    assert torch.equal(logits(again, ids), logits(model, ids))
    tensors = adapted.tensors()
    name = next(iter(tensors))
    with pytest.raises(UserError, match="lacks"):
        other.load({key: t for key, t in tensors.items() if key != name})
    with pytest.raises(UserError, match="holds extra, which this model has not"):
        other.load(tensors | {"extra": torch.ones(1)})
    with pytest.raises(UserError, match="this model's is"):
        other.load(tensors | {name: torch.ones(3, 3)})


def changed_folder(folder: Path, tensors: Any = None, **told: Any) -> Path:
    """An adapter's folder with other settings, or with tensors renamed or replaced."""
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | told))
    if tensors is not None:
        save_file(tensors(load_file(weights)), weights)
    return folder


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("told", "tensors", "says"),
    [
        ({"peft_type": "LOHA"}, None, "peft_type 'LOHA' is not supported; supported: LORA, IA3, BOTTLENECK"),
        ({"peft_type": None}, None, "peft_type None is not supported"),
        ({}, renamed("layers.1", "layers.7"), "layers.7.self_attn.q_proj changes nothing that this model has"),
        ({}, renamed("q_proj", "qkv"), "self_attn.qkv changes nothing"),
        ({}, renamed("lora_A", "lora_embedding_A"), "is not supported; merge it with PEFT"),
        ({}, renamed("layers.0.self_attn.q_proj.lora_B", "norm"), "lacks model.layers.0.self_attn.q_proj.lora_B"),
        ({}, renamed("lora_", "loha_"), "changes no layer"),
        ({}, lambda t: {n: x[:, :9].clone() for n, x in t.items()}, "lora_A.weight is (4, 9), this model's is (4, 64)"),
        ({"use_dora": True}, None, "lacks model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"bias": "all"}, None, "bias = 'all' is not supported"),
        ({"layer_replication": [[0, 2]]}, None, "layer_replication = [[0, 2]] is not supported"),
        ({"init_lora_weights": "olora"}, None, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "path_initial_model_for_weight_conversion"),
        ({}, lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.ones(99, 64)}, "is (99, 64)"),
        ({}, lambda t: t | {"base_model.model.model.norms.weight": torch.ones(64)}, "norms.weight changes nothing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(told, tensors, says, ours, tmp_path: Path) -> None:
    save_adapter(adapt(ours("qwen3"), config(target=["q_proj"]), seed=0), tmp_path / "a", "base")
    folder = changed_folder(tmp_path / "a", tensors, **told)
    with pytest.raises(UserError) as caught:
        load_adapter(ours("qwen3"), folder)
    assert says in str(caught.value) and str(caught.value).startswith(str(folder))


def test_what_cannot_be_read_is_refused(ours, tmp_path: Path) -> None:
    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says):
            load_adapter(ours("qwen3"), tmp_path / "a")

    refused("no adapter can be read here")
    save_adapter(adapt(ours("qwen3"), config(), seed=0), tmp_path / "a", "base")
    weights, told = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("no adapter can be read here")
    weights.rename(weights.with_suffix(".bin"))
    refused("is a pickle, which could run any program")
    told.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not say which model it was trained on"):
        base_of(tmp_path / "a")
    told.write_text("[]")
    refused("holds no JSON object")
    told.write_text("{")
    refused("no adapter can be read here")


@pytest.mark.parametrize(
    ("save", "says"), [("embed_tokns", "did you mean embed_tokens?"), ("lm_head,q", "'q' is no module")]
)
def test_what_is_to_be_saved_must_be_there(save, says, ours) -> None:
    with pytest.raises(UserError) as caught:
        adapt(ours("qwen3"), config(save=save), seed=0)
    assert caught.value.where == "adapt.save" and says in str(caught.value)
