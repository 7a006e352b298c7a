"""A folder that cannot be used is one line that names the place; a save is whole or not there."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import SafetensorError

from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.io import load_model, save_model
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
        ({"model_type": "gpt2"}, "supported: llama, qwen2, qwen3"),
        ({"model_type": None}, "supported: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding-window"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding-window"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"partial_rotary_factor": 0.5}, "partial"),
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
