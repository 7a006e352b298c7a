"""The recipes for downloaded models run, and move what they say that they move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from groundup.config import load_recipe
from groundup.model.config import ModelConfig
from groundup.model.io import load_model, save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import load_tokenizer
from groundup.train.run import train

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(one for kind in ("continue", "sft") for one in ROOT.glob(f"{kind}-*.yaml"))


@pytest.fixture(scope="module")
def folder(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 inputs everywhere: a block of NF4."""
    path, tokenizer = tmp_path_factory.mktemp("folder"), load_tokenizer(ground / "tok")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 64, 64, 1, 2, 1, 32, max_position_embeddings=128))
    model.init_weights(0)
    save_model(model, path)
    tokenizer.save(path)
    return path


def test_there_are_recipes_for_all_that_one_gpu_or_a_cpu_can_do() -> None:
    kinds = {(r.stage, r.adapt.method, r.adapt.base) for r in map(load_recipe, RECIPES)}
    assert kinds >= {
        ("pretrain", "full", "full"), ("pretrain", "lora", "full"), ("pretrain", "freeze", "full"),
        ("sft", "full", "full"), ("sft", "lora", "full"), ("sft", "lora", "nf4"),
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_moves_what_it_says(path: Path, ground: Path, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    data, output = ground / ("text.jsonl" if recipe.stage == "pretrain" else "chat.jsonl"), tmp_path / "out"
    given = [f"model={folder}", f"data={data},{data}", f"output={output}", f"cache={ground / 'cache'}"]
    given += ["train.steps=3", "train.seq_len=64", "train.batch_size=2", "train.accumulate=2", "train.threads=1"]
    result = train(path, [*given, "train.device=cpu", "train.eval_rows=4", "log.plots=false"], peak=1e9)
    assert result["steps"] == 3 and result["output"] == str(output)
    old = load_file(folder / "model.safetensors")
    if recipe.adapt.method == "lora":
        settings = json.loads((output / "adapter_config.json").read_text())
        assert (settings["peft_type"], settings["r"]) == ("LORA", recipe.adapt.rank)
        names = load_file(output / "adapter_model.safetensors").keys()
        assert any("embed_tokens" in name for name in names) == ("embed_tokens" in recipe.adapt.save)
        assert all("lora_" in name or "embed_tokens" in name or "lm_head" in name for name in names)
        assert not (output / "model.safetensors").exists()
    else:
        new = load_model(output).state_dict()
        moved = {name for name in old if not torch.equal(old[name], new[name])}
        wanted = {name for name in old if "embed_tokens" in name} if recipe.adapt.method == "freeze" else set(old)
        assert moved == wanted
