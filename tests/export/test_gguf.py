"""Out as GGUF and in again: the same weights, the same config, the same tokenizer, and reports that tell the truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from export_models import FAMILIES, make_model, same_model

from groundup.export.from_gguf import import_gguf
from groundup.export.names import interleave, undo_interleave
from groundup.export.reader import GgufFile
from groundup.export.run import export
from groundup.export.shards import plan_shards
from groundup.model.config import ModelConfig
from groundup.model.io import load_model
from groundup.tokenizer import Tokenizer, load_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_out_and_in_is_the_same_model(tokenizer: Tokenizer, tmp_path: Path, family: str) -> None:
    folder = make_model(tokenizer, tmp_path / "model", spare_rows=7, **FAMILIES[family])
    report = export(folder, "gguf", "f32", tmp_path / "model.gguf")
    assert report["check"]["max_abs_difference"] < 1e-4
    assert report["check"]["top1_agreement"] == 1.0
    assert report["pre_tokenizer"] == "gpt-2" and report["notes"] == []
    assert set(report["tensors"]) == {"F32"}
    assert report["bytes"] == (tmp_path / "model.gguf").stat().st_size
    back = import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert back["architecture"] == FAMILIES[family]["model_type"]
    same_model(folder, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model", "model.gguf"]


def test_the_tokenizer_comes_back_whole(model_dir: Path, tmp_path: Path) -> None:
    """Special tokens keep their ids and kinds, and a chat renders to the same ids and the same mask."""
    export(model_dir, "gguf", "f32", tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    before, after = load_tokenizer(model_dir), load_tokenizer(tmp_path / "back")
    kinds = [
        {i: (t.content, t.special) for i, t in each.backend.get_added_tokens_decoder().items()}
        for each in (before, after)
    ]
    assert kinds[0] == kinds[1]
    chat = [
        {"role": "system", "content": "You are Ada."},
        {"role": "user", "content": "<|im_end|> 1+1?\n\n  你好"},
        {"role": "assistant", "content": "2", "reasoning_content": "easy"},
    ]
    for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        one, two = before.render(chat, **options), after.render(chat, **options)
        assert (one.ids, one.mask, one.text) == (two.ids, two.mask, two.text)
    texts = ["", "  \n\t x  ", "don't 12345", "DON'T", "蓝色房子 1", "\U0001f600\x00", "a" * 50]
    assert before.encode_batch(texts) == after.encode_batch(texts)


def test_fields_that_llama_cpp_needs(model_dir: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    export(model_dir, "gguf", "f16", tmp_path / "model.gguf")
    file = GgufFile(tmp_path / "model.gguf")
    config = load_model(model_dir).config
    assert file.architecture == "qwen3"
    assert (file.own("attention.key_length"), file.own("attention.value_length")) == (config.head_dim,) * 2
    assert file.own("rope.freq_base") == config.rope_theta
    assert file.own("context_length") == config.max_position_embeddings
    tokens, kinds = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == config.vocab_size
    named = dict(zip(tokens, kinds, strict=True))
    assert named["<|im_end|>"] == named["<|endoftext|>"] == 3, "control: parsed, never shown"
    assert named["<think>"] == named["<tool_call>"] == 4, "user-defined: parsed, and shown"
    assert named["a"] == 1
    ids = {name: file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    wanted = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "eot": tokenizer.eos_id, "padding": tokenizer.pad_id}
    assert ids == wanted
    assert file.get("tokenizer.ggml.add_bos_token") is False
    assert "output.weight" not in file.tensors, "a tied head is stored once"


def test_spare_rows_are_unused_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = make_model(tokenizer, tmp_path / "model", spare_rows=5)
    export(folder, "gguf", "f32", tmp_path / "model.gguf")
    file = GgufFile(tmp_path / "model.gguf")
    size = tokenizer.vocab_size
    assert file.get("tokenizer.ggml.tokens")[size:] == [f"[PAD{i}]" for i in range(size, size + 5)]
    assert file.get("tokenizer.ggml.token_type")[size:] == [5] * 5
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").vocab_size == size
    assert load_model(tmp_path / "back").config.vocab_size == size + 5


def test_quantised_types_and_what_they_cost(model_dir: Path, tmp_path: Path) -> None:
    reports = {quant: export(model_dir, "gguf", quant, tmp_path / quant) for quant in ("f32", "f16", "q8_0", "q4_0")}
    assert reports["f16"]["tensors"] == {"F16": 15, "F32": 9}
    assert reports["q8_0"]["tensors"] == {"F32": 9, "Q8_0": 15}
    assert reports["q4_0"]["tensors"] == {"F32": 9, "Q4_0": 14, "Q8_0": 1}, "an embedding of 4 bits costs too much"
    kl = [reports[quant]["check"]["kl"] for quant in ("f32", "f16", "q8_0", "q4_0")]
    assert kl == sorted(kl) and kl[0] < 1e-9 < kl[1] and kl[2] < 0.05
    assert reports["q8_0"]["check"]["top1_agreement"] > 0.9
    sizes = [reports[quant]["bytes"] for quant in ("f32", "f16", "q8_0", "q4_0")]
    assert sizes == sorted(sizes, reverse=True)
    report = import_gguf(tmp_path / "q4_0", tmp_path / "back")
    assert report["tensors"] == reports["q4_0"]["tensors"]
    original, back = (load_model(folder).state_dict() for folder in (model_dir, tmp_path / "back"))
    for name, tensor in original.items():
        error = (back[name] - tensor).norm() / tensor.norm()
        assert error < (0.15 if tensor.ndim > 1 else 1e-7), name


def test_rows_that_no_block_divides_stay_in_f16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = make_model(tokenizer, tmp_path / "model", hidden_size=48, intermediate_size=96)
    report = export(folder, "gguf", "q8_0", tmp_path / "model.gguf")
    assert report["tensors"] == {"F16": 11, "F32": 9, "Q8_0": 4}
    assert "11 matrices" in report["notes"][0]


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q5_1", "BF16"])
def test_other_types_come_in(model_dir: Path, tmp_path: Path, kind: str) -> None:
    """A file that another tool quantised: every matrix rewritten in a type that we do not write ourselves."""
    export(model_dir, "gguf", "f32", tmp_path / "model.gguf")
    source = gguf.GGUFReader(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen3")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    wanted = {}
    for tensor in source.tensors:
        type_ = gguf.GGMLQuantizationType[kind if len(tensor.shape) > 1 else "F32"]
        data = gguf.quantize(np.array(tensor.data), type_)
        wanted[tensor.name] = gguf.dequantize(data, type_)
        writer.add_tensor(tensor.name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert import_gguf(tmp_path / "other.gguf", tmp_path / "back")["tensors"] == {"F32": 9, kind: 15}
    found = load_model(tmp_path / "back").model.layers[1].mlp.down_proj.weight
    assert torch.equal(found, torch.from_numpy(wanted["blk.1.ffn_down.weight"]))


def test_import_in_shards(model_dir: Path, tmp_path: Path) -> None:
    export(model_dir, "gguf", "f32", tmp_path / "model.gguf")
    report = import_gguf(tmp_path / "model.gguf", tmp_path / "back", max_shard_bytes=100_000)
    assert len(report["files"]) > 2
    same_model(model_dir, tmp_path / "back")


def test_an_imported_folder_can_leave_again(model_dir: Path, tmp_path: Path) -> None:
    """Out, in, out: the second file says what the first said."""
    export(model_dir, "gguf", "f32", tmp_path / "one.gguf")
    import_gguf(tmp_path / "one.gguf", tmp_path / "back")
    export(tmp_path / "back", "gguf", "f32", tmp_path / "two.gguf")
    one, two = (GgufFile(tmp_path / name) for name in ("one.gguf", "two.gguf"))
    for name in one._reader.fields:
        if name != "general.name":
            assert one.get(name) == two.get(name), name


def test_end_tokens_of_the_folder_travel(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    export(folder, "gguf", "f32", tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert load_tokenizer(tmp_path / "back").stop_ids == [0, 2]


def test_interleaving_is_undone_and_moves_only_llama() -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    sizes |= {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config = ModelConfig(model_type="llama", **sizes)
    rows = np.arange(8.0)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert interleave(name, rows, config).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    matrix = np.random.default_rng(0).normal(size=(8, 8))
    for name in (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qk"):
        assert np.array_equal(undo_interleave(name, interleave(name, matrix, config), config), matrix)
    assert interleave("model.layers.0.self_attn.v_proj.weight", matrix, config) is matrix
    assert interleave(name, matrix, ModelConfig(model_type="qwen3", **sizes)) is matrix


def test_shards_keep_order_and_size() -> None:
    sizes = {"a": 5, "b": 5, "c": 1, "d": 20, "e": 3}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan_shards(sizes, 100) == [list(sizes)]
