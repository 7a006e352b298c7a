"""Whatever a person can get wrong ends in one line that names the place and the way out, with exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHAT = {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def fails(result: Any, *parts: str) -> None:
    """One line on stderr (beside progress), exit code 2, no traceback, and every part named."""
    lines = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert result.code == 2, result
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err + result.out
    for part in parts:
        assert part in lines[0], lines[0]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BAD_FILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("bad.jsonl",)),
    "broken JSON": (json.dumps({"text": "a"}) + '\n{"text": "b"}\n{"text": \n', ("bad.jsonl:3",)),
    "wrong key": (json.dumps({"txet": "a"}) + "\n", ("bad.jsonl:1", "txet", "text")),
    "invalid UTF-8": (b'{"text": "fine"}\n{"text": "\xff\xfe"}\n', ("bad.jsonl:2", "UTF-8")),
    "one line of 50 MB": (b'{"text": "' + b"a" * 50_000_000 + b'"}\n', ("bad.jsonl:1", "MB")),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, groundup: Callable, tmp_path: Path) -> None:
    content, parts = BAD_FILES[name]
    path = write(tmp_path / "bad.jsonl", content)
    fails(groundup("tokenizer", "train", path, "--output", tmp_path / "t"), *parts)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_stop_training_before_anything_is_written(
    name: str, groundup: Callable, files: Any, tmp_path: Path
) -> None:
    content, parts = BAD_FILES[name]
    path = write(tmp_path / "bad.jsonl", content)
    fails(groundup(*files.train("pretrain", tmp_path / "run", f"data={path}")), *parts)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_directory(groundup: Callable, files: Any, tmp_path: Path) -> None:
    fails(groundup("data", "inspect", tmp_path), str(tmp_path), "dataset_info.json")
    fails(groundup("train", tmp_path), "directory")


def test_a_missing_file_names_its_neighbour(groundup: Callable, files: Any) -> None:
    fails(groundup("data", "inspect", files.text.with_name("pretrian.jsonl")), "pretrain.jsonl")


def test_rows_that_train_nothing(groundup: Callable, files: Any, tmp_path: Path) -> None:
    silent = {"conversations": [{"role": "user", "content": "hi"}, {"role": "user", "content": "anyone?"}]}
    path = write(tmp_path / "silent.jsonl", "".join(json.dumps(row) + "\n" for row in [CHAT, silent, silent]))
    fails(groundup(*files.train("sft", tmp_path / "run", f"data={path}")), "silent.jsonl")


def test_a_sequence_length_of_one(groundup: Callable, files: Any, tmp_path: Path) -> None:
    fails(groundup(*files.train("pretrain", tmp_path / "run", "train.seq_len=1")), "train.seq_len")


def test_a_vocabulary_smaller_than_its_specials(groundup: Callable, files: Any, tmp_path: Path) -> None:
    fails(groundup("tokenizer", "train", files.text, "--vocab-size", 100, "--output", tmp_path / "t"), "100")


def test_an_unknown_key_says_which_was_meant(groundup: Callable, files: Any, tmp_path: Path) -> None:
    fails(groundup(*files.train("pretrain", tmp_path / "run", "train.stesp=5")), "train.stesp", "train.steps")


def test_an_unknown_preset_or_recipe(groundup: Callable, files: Any, tmp_path: Path) -> None:
    fails(groundup(*files.train("pretrain", tmp_path / "run", "model=smal-26m")), "smal-26m", "small-26m")
    fails(groundup("train", Path(files.train("pretrain", tmp_path)[1]).with_name("pretrian.yaml")), "pretrain.yaml")


def test_a_model_folder_without_tokenizer(groundup: Callable, files: Any, tmp_path: Path) -> None:
    assert groundup(*files.train("pretrain", tmp_path / "run")).code == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "run" / name).unlink()
    fails(groundup("generate", tmp_path / "run", "hi"), "run", "tokenizer.json")
    fails(groundup("chat", tmp_path), "config.json")


def test_weights_cut_in_half(groundup: Callable, files: Any, tmp_path: Path) -> None:
    assert groundup(*files.train("pretrain", tmp_path / "run")).code == 0
    weights = tmp_path / "run" / "model.safetensors"
    write(weights, weights.read_bytes()[: weights.stat().st_size // 2])
    fails(groundup("generate", tmp_path / "run", "hi"), "model.safetensors")


def test_a_checkpoint_cut_in_half_falls_back_to_the_one_before(groundup: Callable, files: Any, tmp_path: Path) -> None:
    run = files.train("pretrain", tmp_path / "run", "train.save_every=1", "train.keep_last=3")
    assert groundup(*run).code == 0
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    for name in ("result.json", "model.safetensors"):  # as if killed before the end
        (tmp_path / "run" / name).unlink(missing_ok=True)
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    weights = newest / "model.safetensors"
    write(weights, weights.read_bytes()[: weights.stat().st_size // 2])
    again = groundup(*run)
    assert again.code == 0, again.err
    assert newest.name in again.err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole


def test_another_recipe_on_the_same_output(groundup: Callable, files: Any, tmp_path: Path) -> None:
    assert groundup(*files.train("pretrain", tmp_path / "run")).code == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    fails(groundup(*files.train("pretrain", tmp_path / "run", "optim.lr=1e-5")), "optim.lr")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    again = groundup(*files.train("pretrain", tmp_path / "run"))
    assert again.code == 0
    assert "already finished" in again.out


def test_a_full_disk(groundup: Callable, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 1000, 1000))
    fails(groundup(*files.train("pretrain", tmp_path / "run")), "disk")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_memory_that_cannot_be_had(groundup: Callable, files: Any, tmp_path: Path) -> None:
    result = groundup(*files.train("pretrain", tmp_path / "run", "train.batch_size=1000000"))
    fails(result, "train.batch_size", "GB")


def test_quickstart_refuses_other_settings_in_the_same_folder(groundup: Callable, tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text(
        json.dumps({"settings": {"minutes": 3.0, "data": [], "depth": None, "seed": 0}, "steps": {}})
    )
    fails(groundup("quickstart", "--minutes", 4, "--output", tmp_path), "--minutes")
    fails(groundup("quickstart", "--minutes", 0, "--output", tmp_path / "new"), "--minutes")


def test_debug_shows_the_traceback(groundup: Callable, tmp_path: Path) -> None:
    from groundup.errors import UserError

    with pytest.raises(UserError):
        groundup("--debug", "data", "inspect", tmp_path / "nothing.jsonl")
