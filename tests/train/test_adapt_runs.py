"""A run in which only a part of a model moves: what it saves, resumes from, and is used as."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import NURSERY
from train_helpers import figures, small_recipe

from groundup.adapt.open import open_model, open_tokenizer
from groundup.errors import UserError
from groundup.eval.run import evaluate
from groundup.infer.generate import generate
from groundup.infer.params import SamplingParams
from groundup.model.io import load_model

Make = Callable[..., dict[str, Any]]
Run = Callable[..., dict[str, Any]]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "lr_ratio": 4},
    "qlora": {"method": "lora", "rank": 4, "base": "nf4"},
    "int8": {"method": "lora", "rank": 4, "base": "int8", "dropout": 0.1},
    "dora": {"method": "lora", "rank": 4, "dora": True, "target": ["q_proj", "v_proj"]},
    "pissa": {"method": "lora", "rank": 4, "init": "pissa"},
    "whole": {"method": "lora", "rank": 4, "save": ["embed_tokens"]},
    "ia3": {"method": "ia3"},
    "bottleneck": {"method": "bottleneck", "width": 8},
    "prompt": {"method": "prompt", "tokens": 4},
    "p_tuning": {"method": "p_tuning", "tokens": 4, "width": 16},
    "prefix": {"method": "prefix", "tokens": 4, "width": 16},
    "p_tuning_v2": {"method": "p_tuning_v2", "tokens": 4},
}

LIVES = """
dice, ends = random.Random(3), []
for _ in range(6):
    limit = dice.randrange(total // 20, total // 2)
    ends.append(life(root + "/killed", lambda: count_calls(limit)))
assert life(root + "/killed", lambda: None) == 0
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def wide(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ground` with a model whose widths are multiples of NF4's block, and trained for a moment."""
    from groundup.model.config import ModelConfig
    from groundup.model.io import save_model
    from groundup.model.transformer import Transformer
    from groundup.tokenizer import load_tokenizer

    root = tmp_path_factory.mktemp("wide")
    shutil.copytree(ground, root, dirs_exist_ok=True)
    tokenizer = load_tokenizer(root / "tok")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 64, 128, 2, 2, 1, 32, max_position_embeddings=128))
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # not zero: quantised, they would stay so
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    save_model(model, root / "model")
    return root


def tuned(wide: Path, root: Path, **changes: Any) -> dict[str, Any]:
    return small_recipe(wide, root, stage="sft", data=str(wide / "chat.jsonl"), **changes)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_saves_and_answers(name: str, wide: Path, tmp_path: Path, run: Run) -> None:
    rate = 0.3 if name == "p_tuning_v2" else 1e-2  # few numbers, far from what they change
    recipe = tuned(wide, tmp_path, adapt=METHODS[name], **{"optim.lr": rate, "train.steps": 12})
    result = run(recipe)
    output = Path(result["output"])
    losses = [line["val_loss"] for line in figures(output) if "val_loss" in line]
    assert losses[-1] < losses[0]
    assert result["trained_parameters"] < result["parameters"] / 2 or name == "whole"
    assert not (output / "model.safetensors").exists()
    assert (output / "adapter_model.safetensors").stat().st_size < (wide / "model" / "model.safetensors").stat().st_size
    model, tokenizer = open_model(output), open_tokenizer(output)
    ids = tokenizer.render([{"role": "user", "content": "the cat"}], add_generation_prompt=True).ids
    adapted = generate(model, tokenizer, [ids], SamplingParams(max_tokens=6, ignore_eos=True))[0]
    base = generate(load_model(wide / "model"), tokenizer, [ids], SamplingParams(max_tokens=6, logprobs=0))[0]
    assert len(adapted.ids) == 6 and base.ids is not None
    measured = evaluate(output, data=[wide / "chat.jsonl"])["files"][0]["bits_per_byte"]
    assert measured < evaluate(wide / "model", data=[wide / "chat.jsonl"])["files"][0]["bits_per_byte"]


def test_freezing_leaves_a_model_whose_other_layers_are_as_they_were(wide: Path, tmp_path: Path, run: Run) -> None:
    result = run(tuned(wide, tmp_path, adapt={"method": "freeze", "last": 1}))
    before, after = (
        load_file(wide / "model" / "model.safetensors"),
        load_file(Path(result["output"]) / "model.safetensors"),
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".layers.1." in name for name in moved)


def test_killed_and_resumed_it_ends_in_the_same_bytes(wide: Path, tmp_path: Path) -> None:
    settings = tuned(wide, tmp_path, adapt=METHODS["lora"] | {"dropout": 0.1}, **{"train.ema": 0.9, "train.steps": 8})
    done = subprocess.run(
        [sys.executable, "-c", NURSERY + LIVES, json.dumps(settings), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 9 in json.loads(done.stdout.splitlines()[-1])  # SIGKILL took some of them
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("alone", "killed")]
    assert files[0] == files[1] and figures(tmp_path / "alone") == figures(tmp_path / "killed")
    for checkpoint in (tmp_path / "killed" / "checkpoints").iterdir():
        saved = load_file(checkpoint / "model.safetensors")
        assert saved and all(".a" in name or ".b" in name or "lora" in name for name in saved), sorted(saved)[:3]
        assert sum(t.numel() for t in saved.values()) < 40_000


def test_another_base_is_refused_when_a_run_goes_on(wide: Path, tmp_path: Path, run: Run) -> None:
    model = tmp_path / "model"
    shutil.copytree(wide / "model", model)
    recipe = tuned(wide, tmp_path, adapt=METHODS["lora"], model=str(model))
    run(recipe)
    (tmp_path / "run" / "done.json").unlink()
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    from safetensors.torch import save_file

    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights have changed since"):
        run(recipe)


def test_memory_is_planned_and_measured_by_part(wide: Path, tmp_path: Path, run: Run) -> None:
    memory = run(tuned(wide, tmp_path, adapt=METHODS["qlora"]))["memory"]
    for part in ("weights", "gradients", "optimizer"):
        assert memory["measured"][part] == pytest.approx(memory["planned"][part], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapt": {"method": "lora", "target": ["wq"]}}, "wq"),
        ({"adapt": {"method": "full", "base": "nf4"}}, "adapt.base"),
        ({"adapt": {"method": "lora"}, "model": "tiny"}, "knows nothing yet"),
        ({"adapt": {"method": "prompt", "rank": 0}}, "adapt.rank"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    changes: dict[str, Any], words: str, wide: Path, tmp_path: Path, run: Run
) -> None:
    with pytest.raises(UserError, match=words) as error:
        run(tuned(wide, tmp_path, tokenizer=str(wide / "tok"), **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_an_adapter_is_no_base_and_says_where_its_own_has_gone(wide: Path, tmp_path: Path, run: Run) -> None:
    model = tmp_path / "model"
    shutil.copytree(wide / "model", model)
    run(tuned(wide, tmp_path, adapt=METHODS["ia3"], model=str(model)))
    with pytest.raises(UserError, match="groundup merge"):
        run(tuned(wide, tmp_path, model=str(tmp_path / "run"), output="again"))
    shutil.rmtree(model)
    with pytest.raises(UserError, match="base_model_name_or_path"):
        open_model(tmp_path / "run")
