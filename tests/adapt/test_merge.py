"""Merged weights are PEFT's; a merged folder is a stock one that does what base and adapters did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_helpers import LORAS, close, config, into_peft, logits, trained
from safetensors.torch import load_file, save_file

from groundup.adapt.build import adapt
from groundup.adapt.folder import save_adapter
from groundup.adapt.lora import LoraLinear
from groundup.adapt.merge import merge
from groundup.errors import UserError
from groundup.model.io import load_model

KINDS = {**{kind: ("lora", changed) for kind, changed in LORAS.items()}, "ia3": ("ia3", {})}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["qwen3", "qwen2", "gpt2"])
def test_merged_weights_are_peft_s(base, kind, ours, stock, ids, tmp_path: Path) -> None:
    method, changed = KINDS[kind]
    model = ours(base)
    adapted = trained(model, config(method, **changed))
    theirs = into_peft(adapted, stock(base), tmp_path / "a").merge_and_unload().state_dict()
    before = logits(model, ids)
    adapted.merge()
    close(logits(model, ids), before, 1e-4)
    state = model.state_dict()
    assert state.keys() - {"lm_head.weight"} == theirs.keys() - {"lm_head.weight"}  # a plain model's names again
    for name, weight in state.items():
        close(weight, theirs[name])
    assert all(p.requires_grad for p in model.parameters())


@pytest.fixture
def base(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A bf16 base with a tokenizer, a template and habits, but for one tensor in fp32."""
    folder = tmp_path / "base"
    folder.mkdir()
    state = load_file(folders["qwen2"] / "model.safetensors")
    state = {name: t if name == "model.norm.weight" else t.bfloat16() for name, t in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folders["qwen2"] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"dtype": "bfloat16"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "LICENSE"):
        (folder / name).write_text(f"the base's {name}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "recipe.yaml").write_text("not the model's")
    return folder


def adapter(folder: Path, base: Path, seed: int = 0, **changed: Any) -> Path:
    save_adapter(trained(load_model(base), config(**changed), seed), folder, str(base))
    return folder


def test_a_merged_folder(base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    model = load_model(base)
    adapted = trained(model, config())
    save_adapter(adapted, tmp_path / "a", str(base))
    found = merge(base, [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert found["layers"] == 14 and found["dtype"] == "bfloat16"
    assert found["max_difference"] < 1e-4 < found["max_difference_as_stored"] < 1
    state, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    assert {name: t.dtype for name, t in state.items()} == {name: t.dtype for name, t in before.items()}
    merged = load_model(tmp_path / "out")
    difference = (logits(merged, ids) - logits(model, ids)).abs().max()
    assert difference < 0.5 < (logits(load_model(base), ids) - logits(model, ids)).abs().max()
    adapted.merge()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight.to(state[name].dtype))  # rounded once
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in base.iterdir()} - {"recipe.yaml"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the base's chat_template.jinja"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_several_with_weights_are_the_sum(folders, stock, ids, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    paths = [
        adapter(tmp_path / "a", folders["qwen3"], 1, target=["q_proj", "up_proj"]),
        adapter(tmp_path / "b", folders["qwen3"], 2, target=["q_proj", "v_proj"], rslora=True),
    ]
    found = merge(folders["qwen3"], [(paths[0], 0.7), (paths[1], -0.4)], tmp_path / "out")
    assert found["max_difference"] < 1e-4 and found["layers"] == 6
    theirs = peft.PeftModel.from_pretrained(stock("qwen3"), str(paths[0]), adapter_name="a")
    theirs.load_adapter(str(paths[1]), adapter_name="b")
    wanted = {name: p.detach().clone() for name, p in stock("qwen3").named_parameters()}
    for name, module in theirs.base_model.model.named_modules():
        for one, weight in (("a", 0.7), ("b", -0.4)):
            if one in getattr(module, "lora_A", {}):
                wanted[f"{name}.weight"] += weight * module.get_delta_weight(one).detach()
    for name, weight in load_model(tmp_path / "out").state_dict().items():
        close(weight, wanted[name])


def test_weight_of_dora_goes_part_of_the_way(folders, ids, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", folders["qwen2"], dora=True)
    for weight, name in ((1.0, "all"), (0.25, "part"), (0.0, "none")):
        merge(folders["qwen2"], [(path, weight)], tmp_path / name)
    whole, part, none = (load_model(tmp_path / name).state_dict() for name in ("all", "part", "none"))
    plain = load_model(folders["qwen2"]).state_dict()
    for name in plain:
        assert torch.equal(none[name], plain[name])
        close(part[name], plain[name] + 0.25 * (whole[name] - plain[name]))


@pytest.mark.parametrize("base", ["qwen3", "qwen2", "gpt2"])
def test_with_modules_trained_whole(base, folders, ids, tmp_path: Path) -> None:
    model = load_model(folders[base])
    save_adapter(trained(model, config(save=["embed_tokens", "lm_head"])), tmp_path / "a", "base")
    merge(folders[base], [(tmp_path / "a", 1.0)], tmp_path / "out")
    close(logits(load_model(tmp_path / "out"), ids), logits(model, ids), 1e-4)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["tie_word_embeddings"] == (base != "qwen2")
    save_adapter(trained(load_model(folders[base]), config(save=["lm_head"])), tmp_path / "b", "base")
    for chosen in ([("a", 0.5)], [("a", 1.0), ("b", 1.0)]):
        with pytest.raises(UserError, match="neither weighed nor summed"):
            merge(folders[base], [(tmp_path / name, weight) for name, weight in chosen], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_head_that_peft_parted_from_its_embedding(folders, stock, ids, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference")
    for base, embedding in (("qwen3", "embed_tokens"), ("gpt2", "wte")):
        settings = peft.LoraConfig(modules_to_save=[embedding], target_modules="all-linear", init_lora_weights=False)
        theirs = peft.get_peft_model(stock(base), settings).eval()
        with torch.no_grad():
            theirs.base_model.model.get_input_embeddings().weight.mul_(1.5)
        theirs.save_pretrained(tmp_path / base)
        merge(folders[base], [(tmp_path / base, 1.0)], tmp_path / f"{base}-out")
        close(logits(load_model(tmp_path / f"{base}-out"), ids), logits(theirs, ids), 1e-4)


@pytest.mark.parametrize("base", ["qwen3", "qwen2", "gpt2"])
def test_tokens_that_were_added_make_room_for_themselves(base, folders, stock, tmp_path: Path) -> None:
    """As PEFT's users add them: the base resized in memory, embedding and head saved whole; its folder is as ever."""
    peft = pytest.importorskip("peft", reason="the reference")
    model = stock(base)
    model.resize_token_embeddings(101)
    embedding = "wte" if base == "gpt2" else "embed_tokens"
    settings = peft.LoraConfig(
        modules_to_save=[embedding, "lm_head"], target_modules="all-linear", init_lora_weights=False,
        ensure_weight_tying=base != "qwen2",
    )  # fmt: skip
    theirs = peft.get_peft_model(model, settings).eval()
    theirs.save_pretrained(tmp_path / "a")
    assert merge(folders[base], [(tmp_path / "a", 1.0)], tmp_path / "out")["vocab_size"] == 101
    ids = torch.tensor([[5, 100, 7, 98, 99, 1]])
    merged = load_model(tmp_path / "out")
    close(logits(merged, ids), logits(theirs, ids), 1e-4)
    assert merged.config.tie_word_embeddings == (base != "qwen2")


def test_the_tokenizer_comes_from_the_adapter_that_has_one(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", base, target=["q_proj"])
    (path / "tokenizer.json").write_text("the adapter's")
    merge(base, [(path, 1.0)], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the adapter's"
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert (tmp_path / "out" / "LICENSE").read_text() == "the base's LICENSE"


def test_a_merge_that_computes_something_else_leaves_nothing(base: Path, tmp_path: Path, monkeypatch) -> None:
    path = adapter(tmp_path / "a", base)
    change = LoraLinear.change
    monkeypatch.setattr(LoraLinear, "change", lambda part, w, b: (2 * change(part, w, b)[0], None))
    with pytest.raises(UserError, match="other logits than the merged model"):
        merge(base, [(path, 1.0)], tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("groundup.adapt.merge.load_model", _broken_from_the_second_on())
    with pytest.raises(OSError, match="broken"):
        merge(base, [(path, 1.0)], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def test_weights_too_large_for_their_type_leave_nothing(base: Path, tmp_path: Path) -> None:
    state = load_file(base / "model.safetensors")
    save_file({name: t.half() for name, t in state.items()}, base / "model.safetensors")
    model = load_model(base)
    adapted = trained(model, config(target=["lm_head"]))
    with torch.no_grad():
        adapted.parts["lm_head"].b.mul_(1e7)
    save_adapter(adapted, tmp_path / "a", str(base))
    with pytest.raises(UserError, match=r"by (inf|nan); nothing was written"):
        merge(base, [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def _broken_from_the_second_on() -> Any:
    calls = []

    def load(directory: Path) -> Any:
        calls.append(directory)
        if len(calls) > 1:
            raise OSError("broken")
        return load_model(directory)

    return load


def test_what_cannot_be_merged_is_refused(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(says: str, *adapters: tuple[Path, float], into: Path = base, output: str = "out") -> None:
        with pytest.raises(UserError, match=says):
            merge(into, adapters, tmp_path / output)

    lora = adapter(tmp_path / "lora", base, target=["q_proj"])
    for method in ("bottleneck", "ia3"):
        save_adapter(trained(load_model(base), config(method)), tmp_path / method, "base")
    soft = tmp_path / "soft"
    soft.mkdir()
    (soft / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    refused("is a soft prompt.*train a LoRA", (soft, 1.0))
    refused("is a bottleneck.*train a LoRA", (tmp_path / "bottleneck", 1.0))
    refused("only LoRAs do", (lora, 1.0), (tmp_path / "ia3", 1.0))
    refused("no adapter is named")
    refused("is no weight", (lora, float("nan")))
    refused("exists already", (lora, 1.0), output="lora")
    refused("is an adapter, not a model; name its base", (lora, 1.0), into=lora)
    refused("changes nothing that this model has", (lora, 1.0), into=folders["gpt2"])
    refused("no adapter can be read here", (base, 1.0))
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(told | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    refused("merge into the unquantised base", (lora, 1.0))
    assert not (tmp_path / "out").exists()


def test_an_unquantised_base_takes_in_what_was_learnt_on_a_quantised_one(folders, tmp_path: Path) -> None:
    model = load_model(folders["qwen3"])
    save_adapter(trained(model, config(base="nf4")), tmp_path / "a", str(folders["qwen3"]))
    assert merge(folders["qwen3"], [(tmp_path / "a", 1.0)], tmp_path / "out")["max_difference"] < 1e-4
    assert adapt(load_model(tmp_path / "out"), config(), seed=0) is not None
