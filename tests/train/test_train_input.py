"""What a person can get wrong is said in one line, before anything is trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_helpers import small_recipe

import groundup
from groundup.config import load_recipe
from groundup.errors import UserError
from groundup.model.io import load_model
from groundup.tokenizer import load_tokenizer, train_tokenizer
from groundup.train.run import train

Make = Callable[..., dict[str, Any]]
Run = Callable[..., dict[str, Any]]
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "tinny"}, "no such preset"),
        ({"model": "tiny"}, "tokenizer: is missing"),
        ({"train.seq_len": 256}, "exceeds the model's 128 positions"),
        ({"train.seq_len": 1}, "seq_len"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"train.device": "cuda:0"}, "CUDA"),
        ({"train.dtype": "fp16"}, "fp16"),
        ({"log.to": ["swanlab"]}, "swanlab is not installed"),
        ({"train.sped": 1}, "unknown key train.sped"),
        ({"optim.schedule": "cosin"}, "optim.schedule"),
        ({"train.batch_size": 10**7}, "train.batch_size"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    recipe: Make, run: Run, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(UserError) as error:
        run(recipe(**changes))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_model(recipe: Make, run: Run, tmp_path: Path, ground: Path) -> None:
    texts = [line for line in (ground / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    train_tokenizer(texts, 400).save(tmp_path / "large")
    with pytest.raises(UserError, match=r"has \d+ tokens, the model \d+"):
        run(recipe(tokenizer=str(tmp_path / "large")))


def test_a_model_folder_without_tokenizer(recipe: Make, run: Run, tmp_path: Path, ground: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((ground / "model" / name).read_bytes())
    with pytest.raises(UserError, match="no tokenizer"):
        run(recipe(model=str(bare)))


def test_an_output_that_is_a_file(recipe: Make, run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(UserError, match="another output"):
        run(recipe())


def test_too_little_disk_is_said_before_the_first_step(
    recipe: Make, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from groundup.train import checkpoint

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="disk is full"):
        run(recipe())
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_tensorboard_gets_every_line(recipe: Make, run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = recipe(**{"log.to": ["tensorboard"]})
    run(settings)
    events = EventAccumulator(str(Path(settings["output"]) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("bits_per_byte")] == [3, 6]


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_the_recipes_run_as_they_are_called(name: str, ground: Path, tmp_path: Path) -> None:
    """groundup train recipes/X.yaml model=.. tokenizer=.. data=FILE,FILE output=.. train.steps=N train.save_every=N"""
    data = ground / ("text.jsonl" if name == "pretrain" else "chat.jsonl")
    given = [f"model={ground / 'model'}", f"tokenizer={ground / 'tok'}", f"data={data},{data}"]
    given += [f"output={tmp_path / 'o'}", "train.steps=3", "train.save_every=2"]
    given += ["train.seq_len=64", "train.threads=1", f"cache={ground / 'cache'}"]  # so that it is quick
    result = train(RECIPES / f"{name}.yaml", given, peak=1e9)
    assert (result["name"], result["steps"]) == (name, 3)
    assert load_model(tmp_path / "o").config.vocab_size >= load_tokenizer(tmp_path / "o").vocab_size
    assert sorted(p.name for p in (tmp_path / "o" / "checkpoints").iterdir()) == ["step-2", "step-3"]


# reason.yaml is a pipeline's: tests/test_pipeline_reason.py
@pytest.mark.parametrize("path", sorted(set(RECIPES.glob("*.yaml")) - {RECIPES / "reason.yaml"}), ids=lambda p: p.name)
def test_every_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.output and recipe.data


def test_groundup_train_is_the_function_and_the_room(ground: Path, tmp_path: Path) -> None:
    settings = small_recipe(ground, tmp_path, **{"train.steps": 1})
    result = groundup.train(settings, peak=1e9)
    assert json.loads((tmp_path / "run" / "done.json").read_text()) == result
    model = groundup.load_model(settings["output"])
    tokenizer = groundup.load_tokenizer(settings["output"])
    import torch

    assert model(torch.tensor([tokenizer.encode("the cat")])).shape[-1] == model.config.vocab_size
    assert not model.training
    with pytest.raises(AttributeError):
        groundup.nothing  # noqa: B018
