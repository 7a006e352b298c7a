"""What cannot be exported or imported is one line that names the place, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_models import make_model

from groundup.errors import UserError
from groundup.export.from_gguf import import_gguf
from groundup.export.run import export
from groundup.model.io import load_model, save_model
from groundup.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def file(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export(model_dir, "gguf", "f32", path)
    return path


def refused(action: Any, *said: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    for part in said:
        assert part in text


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for to in ("gguf", "ollama", "hf"):
        refused(lambda to=to: export(tmp_path / "empty", to, None, tmp_path / "out"), "empty", "config.json")
        refused(lambda to=to: export(tmp_path / "none", to, None, tmp_path / "out"), "none")
    assert left(tmp_path) == ["empty"]


def test_a_folder_without_a_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    refused(lambda: export(folder, "gguf", "f32", tmp_path / "out"), "tokenizer")
    refused(lambda: export(folder.parent, "gguf", "f32", tmp_path / "deep" / "out"), "config.json")
    assert left(tmp_path) == ["model"]


def test_an_unknown_form_or_type(model_dir: Path, tmp_path: Path) -> None:
    refused(lambda: export(model_dir, "onnx", None, tmp_path / "out"), "--to", "onnx", "gguf, ollama, hf")
    refused(lambda: export(model_dir, "gguf", "q5_k", tmp_path / "out"), "--quant", "q5_k", "q8_0")
    refused(lambda: export(model_dir, "hf", "q8_0", tmp_path / "out"), "--quant", "bf16")
    refused(lambda: export(model_dir, "hf", None, tmp_path / "out", max_shard_bytes=0), "--max-shard-size")
    assert left(tmp_path) == []


def test_without_the_gguf_package(model_dir: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(lambda: export(model_dir, "gguf", None, tmp_path / "out"), 'pip install "groundup[gguf]"')
    refused(lambda: import_gguf(file, tmp_path / "out"), 'pip install "groundup[gguf]"')
    export(model_dir, "hf", None, tmp_path / "out")  # which needs no such package


def test_an_output_that_exists(model_dir: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for to in ("gguf", "ollama", "hf"):
        refused(lambda to=to: export(model_dir, to, None, tmp_path / "out"), "out", "exists")
    refused(lambda: import_gguf(file, tmp_path / "out"), "exists")
    assert (tmp_path / "out").read_text() == "mine" and left(tmp_path) == ["out"]


def test_an_output_below_a_file(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(lambda: export(model_dir, "gguf", "f32", tmp_path / "file" / "out"), "a file stands")


def test_a_gguf_cut_anywhere(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    sizes = [5, 8, 23, 24, 100, 1000, len(whole) // 8, len(whole) // 4, len(whole) // 2, len(whole) - 40]
    for size in sizes:
        cut.write_bytes(whole[:size])
        refused(lambda: import_gguf(cut, tmp_path / "out"), "cut.gguf", "cut short or damaged")
    assert left(tmp_path) == ["cut.gguf"]


def test_a_gguf_with_a_count_gone_wild(file: Path, tmp_path: Path) -> None:
    """A length of 2**60 must not send the reader on a walk of years."""
    damaged = bytearray(file.read_bytes())
    where = damaged.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    damaged[where : where + 8] = (2**60).to_bytes(8, "little")
    (tmp_path / "wild.gguf").write_bytes(damaged)
    refused(lambda: import_gguf(tmp_path / "wild.gguf", tmp_path / "out"), "damaged")


def test_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGML is not it")
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("text.gguf", "empty.gguf"):
        refused(lambda name=name: import_gguf(tmp_path / name, tmp_path / "out"), name, "not a GGUF")
    refused(lambda: import_gguf(tmp_path / "none.gguf", tmp_path / "out"), "none.gguf", "not a file")
    refused(lambda: import_gguf(tmp_path, tmp_path / "out"), "not a file")


def rewrite(file: Path, to: Path, drop: str = "", architecture: str = "", **changes: Any) -> Path:
    """A copy with other fields; `drop` leaves out a tensor."""
    source = gguf.GGUFReader(file)
    before = source.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(to, architecture or before)
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        key = name.replace(before, architecture) if architecture else name
        value = changes.pop(key.replace(".", "__"), field.contents())
        sub = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, value, field.types[0], sub_type=sub)
    for key, value in changes.items():
        writer.add_uint32(key.replace("__", "."), value)
    for tensor in source.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3'"),
        ({"tokenizer__ggml__model": "llama"}, "llama tokenizer"),
        ({"tokenizer__ggml__pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"drop": "blk.1.ffn_up.weight"}, "blk.1.ffn_up.weight"),
        ({"drop": "token_embd.weight"}, "token_embd.weight"),
        ({"qwen3__block_count": 1}, "blk.1"),
        ({"qwen3__feed_forward_length": 64}, "its header says"),
        ({"qwen3__attention__key_length": 16}, "differ in length"),
        ({"qwen3__expert_count": 4}, "mixtures of experts"),
        ({"qwen3__attention__sliding_window": 64}, "sliding-window"),
        ({"qwen3__rope__scaling__type": 3}, "RoPE scaling"),
        ({"split__count": 2}, "llama-gguf-split"),
    ],
)
def test_a_gguf_that_we_would_compute_wrongly(file: Path, tmp_path: Path, changes: dict, said: str) -> None:
    if "qwen3__rope__scaling__type" in changes:
        changes = {**changes, "qwen3__rope__scaling__factor": 2}
    other = rewrite(file, tmp_path / "other.gguf", **changes)
    refused(lambda: import_gguf(other, tmp_path / "out"), "other.gguf", said)
    assert left(tmp_path) == ["other.gguf"]


def test_weights_that_f16_cannot_hold(model_dir: Path, tmp_path: Path) -> None:
    model = load_model(model_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    folder = shutil.copytree(model_dir, tmp_path / "model")
    save_model(model, folder)
    for to in ("gguf", "hf"):
        refused(lambda to=to: export(folder, to, "f16", tmp_path / "out"), "do not fit")
    assert left(tmp_path) == ["model"]


def test_what_llama_cpp_cannot_compute(model_dir: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 2.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for scaling, said in (
        ({**yarn, "truncate": False}, "yarn"),
        ({**yarn, "beta_slow": 2}, "yarn"),
        (llama3, "llama3"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
        refused(lambda said=said: export(folder, "gguf", "f32", tmp_path / "out"), "rope_scaling", said)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    refused(lambda: export(folder, "gguf", "f32", tmp_path / "out"), "embed_tokens")
    assert left(tmp_path) == ["model"]
    wide = make_model(tokenizer, tmp_path / "wide", model_type="qwen2")
    refused(lambda: export(wide, "gguf", "f32", tmp_path / "out"), "4 heads of 32")
    biased = make_model(tokenizer, tmp_path / "biased", model_type="qwen3", attention_bias=True)
    refused(lambda: export(biased, "gguf", "f32", tmp_path / "out"), "no biases")
    assert left(tmp_path) == ["biased", "model", "wide"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past 100 kB: how the system behaves when a disk takes no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", ["gguf", "ollama", "hf"])
def test_a_disk_that_takes_no_more(model_dir: Path, tmp_path: Path, small_files: None, to: str) -> None:
    refused(lambda: export(model_dir, to, "f32", tmp_path / "out"), "out")
    assert left(tmp_path) == []


def test_importing_to_a_disk_that_takes_no_more(file: Path, tmp_path: Path, small_files: None) -> None:
    refused(lambda: import_gguf(file, tmp_path / "out"), "out")
    assert left(tmp_path) == []


def test_a_full_disk(model_dir: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("groundup.export.shards.save_file", full)
    refused(lambda: export(model_dir, "hf", None, tmp_path / "out"), "the disk is full")
    refused(lambda: import_gguf(file, tmp_path / "out"), "the disk is full")
    assert left(tmp_path) == []


def test_stopped_half_way(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("groundup.export.gguf_file.compare", stop)
    with pytest.raises(KeyboardInterrupt):
        export(model_dir, "gguf", "f32", tmp_path / "out")
    assert left(tmp_path) == []


def test_a_copy_that_computes_something_else_is_not_kept(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check itself: rows that come back in another order are found, and nothing is written."""
    monkeypatch.setattr("groundup.export.gguf_file.undo_interleave", lambda name, array, config: array[::-1].copy())
    refused(lambda: export(model_dir, "gguf", "f32", tmp_path / "out"), "more than rounding")
    assert left(tmp_path) == []
