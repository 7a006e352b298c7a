"""A folder that cannot be used is one line that names the place; a save is whole or not there."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from groundup.errors import UserError
from groundup.model.config import ModelConfig, NotNative
from groundup.model.io import describe, load_model, save_model
from groundup.model.presets import preset
from groundup.model.transformer import Transformer


@pytest.fixture
def folder(tmp_path):
    model = Transformer(preset("tiny", vocab_size=64))
    model.init_weights(0)
    save_model(model, tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    found = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            found.pop(name)
        else:
            found[name] = value
    path.write_text(json.dumps(found))


def test_round_trip_is_bitwise_and_leaves_no_other_file(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    first = load_model(folder)
    save_model(first, folder)
    second = load_model(folder)
    assert first.config == second.config == preset("tiny", vocab_size=64)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "gpt2"}, "53 tensors are missing"),
        ({"model_type": "qwen33"}, "'qwen33' is not known to transformers"),
        ({"model_type": None}, "supported: llama, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope|short_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 31}, "odd"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
        ({"hidden_size": 256}, "model.embed_tokens.weight"),
        ({"num_hidden_layers": 5}, "missing"),
        ({"num_hidden_layers": 3}, "architecture has not"),
        ({"model_type": "llama"}, "norm.weight"),
    ],
)
def test_a_config_we_cannot_compute_is_refused(folder, changes, said):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=said) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["sliding_attention"] * 4, "use_sliding_window": True, "sliding_window": 3}, "sliding-window"),
        ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_we_do_not_compute_transformers_does(folder, changes, said):
    """A detail of one of our own families: as transformers has it, not as if it were not there."""
    ids = torch.arange(2, 22)[None]
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.blocks.parameters():  # ours start as the identity, of which no detail would be seen
            parameter.add_(0.1 * torch.randn_like(parameter))
        without = model(ids)
    save_model(model, folder)
    edit_config(folder, **changes)
    with pytest.raises(NotNative, match=said):
        ModelConfig.from_dir(folder)
    ours = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert describe(ours) == "qwen3: computed by transformers"
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-5)
        assert said == "dynamic" or not torch.allclose(ours(ids), without, atol=1e-3)


def stored(folder):
    return load_file(folder / "model.safetensors")


def store(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_type_of_numbers(folder, dtype):
    before = stored(folder)
    store(folder, {name: tensor.to(dtype) for name, tensor in before.items()})
    model = load_model(folder)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name].to(dtype).float())
    assert load_model(folder, dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


def test_a_tied_head_may_be_stored_twice_or_alone_or_be_another_one(folder):
    before, ids = stored(folder), torch.arange(2, 22)[None]
    embedding = before["model.embed_tokens.weight"]
    logits = load_model(folder)(ids)
    store(folder, {**before, "lm_head.weight": embedding.clone()})
    assert load_model(folder).config.tie_word_embeddings
    assert torch.equal(load_model(folder)(ids), logits)
    head_only = {name: tensor for name, tensor in before.items() if "embed" not in name}
    store(folder, {**head_only, "lm_head.weight": embedding})
    assert torch.equal(load_model(folder)(ids), logits)
    store(folder, {**before, "lm_head.weight": 2 * embedding})
    other = load_model(folder)
    assert not other.config.tie_word_embeddings
    assert torch.equal(other(ids), 2 * logits)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(theirs(ids).logits, other(ids), atol=1e-4)
    save_model(other, folder)
    assert "lm_head.weight" in stored(folder)
    assert torch.equal(load_model(folder)(ids), 2 * logits)


def test_quantised_numbers_are_refused(folder):
    before = stored(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    store(folder, {**before, name: before[name].to(torch.int8)})
    with pytest.raises(UserError, match=f"{name} is stored as int8"):
        load_model(folder)


def test_pickles_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = rf"holds pickled weights \(pytorch_model.bin\).*groundup convert {folder} --output NEW"
    with pytest.raises(UserError, match=said):
        load_model(folder)
    with pytest.raises(UserError, match=r"groundup convert .*pytorch_model.bin --output NEW"):
        load_model(folder / "pytorch_model.bin")
    (folder / "config.json").unlink()
    (folder / "pytorch_model.bin").rename(folder / "full_sft_512.pth")
    with pytest.raises(UserError, match="groundup convert"):
        load_model(folder)


def test_pickles_beside_safetensors_are_nobodys_business(folder):
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert load_model(folder).config == preset("tiny", vocab_size=64)


def test_no_config_and_no_json(folder):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(folder / "nowhere")
    for text in ("{", "[]", "\udcff"):
        (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(UserError, match="JSON"):
            load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, keep if keep >= 1 or keep == 0 else int(size * keep))
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        load_model(folder)


def test_missing_weights_and_bad_index(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither"):
        load_model(folder)
    index = folder / "model.safetensors.index.json"
    for text, said in (("{}", "not a safetensors index"), ('{"weight_map": {"a": "../x"}}', "not in the folder")):
        index.write_text(text)
        with pytest.raises(UserError, match=said):
            load_model(folder)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_failed_write_keeps_the_old_file(folder, monkeypatch, error):
    before = (folder / "model.safetensors").read_bytes()
    names = sorted(folder.iterdir())

    def full_disk(state, path, metadata):
        path.write_text("ha")
        raise error

    monkeypatch.setattr("groundup.model.io.save_file", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        save_model(load_model(folder), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(folder.iterdir()) == names


def test_a_file_where_the_folder_should_be(folder):
    with pytest.raises(UserError, match="a file stands"):
        save_model(load_model(folder), folder / "config.json")


def test_end_tokens_travel(tmp_path):
    changes = {"eos_token_id": [2, 0], "bos_token_id": None}
    config = ModelConfig.from_hf_dict({**preset("tiny", 64).to_hf_dict(), **changes})
    model = Transformer(config)
    model.init_weights(0)
    save_model(model, tmp_path)
    assert load_model(tmp_path).config.eos_token_id == [2, 0]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
