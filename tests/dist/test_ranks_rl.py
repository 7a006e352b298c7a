"""Two gloo ranks learn from their own answers as one process does: the same answers, the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import torchrun

from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import train_tokenizer
from groundup.train.run import train

COMMON = {"prompts": 5, "max_tokens": 6, "beta": 0.1}
EVEN = """
def even(prompts, completions, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in columns["completion_ids"]]
"""
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"stage": "grpo", "group_size": 3, "epochs": 2, "scale_rewards": "batch", "dynamic_sampling": 1},
    "reinforce": {"stage": "grpo", "group_size": 2, "loss": "reinforce++", "kl_in": "reward", "reward_norm": True},
    "ppo": {"stage": "ppo", "group_size": 2, "epochs": 2, "minibatches": 5, "whiten_rewards": True, "kl_target": 0.5,
            "ptx_weight": 0.3, "ptx_rows": 3, "kl_stop": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks-rl")
    words = "the cat sat on a mat and saw one red dog run far from home".split()
    asked = [{"prompt": f"{words[i % 15]} {words[i * 4 % 15]}"} for i in range(30)]
    turns = [{"conversations": [{"role": "user", "content": words[i]}, {"role": "assistant", "content": words[-i]}]}
             for i in range(1, 9)]  # fmt: skip
    for name, rows in (("prompts.jsonl", asked), ("chat.jsonl", turns)):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([" ".join(words)] * 9, 300)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 2, 1, 32, max_position_embeddings=128))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    (root / "even.py").write_text(EVEN)
    save_model(model, root / "model")
    tokenizer.save(root / "model")
    return root


def recipe(ground: Path, name: str, output: str) -> dict[str, Any]:
    settings: dict[str, Any] = {**COMMON, **RUNS[name], "rewards": [f"{ground / 'even.py'}:even"]}
    stage = settings.pop("stage")
    if stage == "ppo":
        settings["ptx_data"] = str(ground / "chat.jsonl")
    return {
        "stage": stage, "model": str(ground / "model"), "data": str(ground / "prompts.jsonl"), "rl": settings,
        "output": str(ground / f"{name}-{output}"), "cache": str(ground / "cache"),
        "train": {"steps": 4, "seq_len": 48, "batch_size": 2, "eval_every": 2, "save_every": 1, "threads": 1,
                  "device": "cpu"},
        "optim": {"lr": 3e-3, "weight_decay": 0.0}, "eval": {"fraction": 0.2}, "log": {"every": 1, "plots": False},
    }  # fmt: skip


def lines(settings: dict[str, Any]) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(settings["output"]) / "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    first, second = lines(a), lines(b)
    assert len(first) == len(second) == 6
    timings = ("tokens_per_second", "share_of_peak", "rollout_seconds")
    for x, y in zip(first, second, strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - set(timings):
            assert x[key] == pytest.approx(y[key], rel=2e-3, abs=2e-4), key
    ours, theirs = (load_file(Path(r["output"]) / "model.safetensors") for r in (a, b))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=3e-5, rtol=1e-4)


def test_two_ranks_equal_one_process_and_a_run_may_change_their_number(ground: Path) -> None:
    torch.set_num_threads(1)
    before = load_file(ground / "model" / "model.safetensors")
    both = [(recipe(ground, name, "two"), None) for name in RUNS]
    torchrun(2, [*both, (recipe(ground, "ppo", "fewer"), 3)], ground / "rank.py")
    for name in RUNS:
        one, two = recipe(ground, name, "one"), recipe(ground, name, "two")
        train(one, peak=1e9)
        after = load_file(Path(one["output"]) / "model.safetensors")
        assert max((before[n] - after[n]).abs().max() for n in before) > 1e-3, "nothing was learnt"
        same(one, two)
    fewer = recipe(ground, "ppo", "fewer")  # started by two ranks, in the middle of a round, ended by one
    assert train(fewer, peak=1e9)["steps"] == 4
    ours, theirs = (load_file(Path(r["output"]) / "model.safetensors") for r in (recipe(ground, "ppo", "one"), fewer))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=3e-5, rtol=1e-4)


def test_more_ranks_than_prompts_are_refused(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from groundup.config import build_recipe
    from groundup.dist import World
    from groundup.errors import UserError
    from groundup.tokenizer import load_tokenizer
    from groundup.train.grpo import GRPO
    from groundup.train.stage import Place

    settings = build_recipe(recipe(ground, "grpo", "none"))
    tokenizer = load_tokenizer(ground / "model")
    data = GRPO.open(settings, tokenizer, Path())
    with pytest.raises(UserError, match="5 prompts are too few for 6 ranks"):
        GRPO(data, settings, Place(torch.device("cpu"), World(0, 6)), tokenizer)
