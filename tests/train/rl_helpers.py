"""A micro policy, questions for it and rewards that it can earn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from train_helpers import small_recipe

REWARDS = '''
from __future__ import annotations

LIKED = set(...)


def liked(prompts, completions, **columns):
    """The share of tokens whose embeddings point one way: it can be learnt in a few steps, by an adapter, too."""
    return [sum(token in LIKED for token in ids) / len(ids) for ids in columns["completion_ids"]]


def same(prompts, completions, **columns):
    return [1.0] * len(completions)


def some(prompts, completions, **columns):
    return [None if len(text) % 3 == 0 else float(len(text) % 2) for text in completions]


def none(prompts, completions, **columns):
    return [None] * len(completions)


def short(prompts, completions, **columns):
    return [0.5] * (len(completions) - 1)


def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)


def raising(prompts, completions, **columns):
    return [1.0 / 0.0 for _ in completions]


def hanging(prompts, completions, **columns):
    while True:
        pass


def silence(prompts, completions, **columns):
    """Nothing is worth more than saying nothing."""
    return [-float(len(ids)) for ids in columns["completion_ids"]]
'''


def write_ground(root: Path, ground: Path) -> Path:
    """`ground` with prompts.jsonl, rewards.py and a policy of random weights that are not all alike (policy/)."""
    from groundup.model.config import ModelConfig
    from groundup.model.io import save_model
    from groundup.model.transformer import Transformer
    from groundup.tokenizer import load_tokenizer

    words = "the cat sat on a mat and saw one red dog run far from home while".split()
    rows = [
        {"prompt": f"{words[i % 16]} {words[i * 7 % 16]} {i}", "answer": str(i), "letter": "ae"[i % 2]}
        for i in range(40)
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = load_tokenizer(ground / "tok")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 2, 1, 32, max_position_embeddings=1024))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if "embed" in name else 0.15))
    first_V = model.head_weight[:, 0]
    liked = (first_V > first_V.median()).nonzero().squeeze(1).tolist()
    (root / "rewards.py").write_text(REWARDS.replace("...", repr(liked)), encoding="utf-8")
    save_model(model, root / "policy")
    tokenizer.save(root / "policy")
    return root


def rl_recipe(root: Path, folder: Path, stage: str = "grpo", **changes: Any) -> dict[str, Any]:
    """Four steps of two rounds of a micro policy, with these dotted keys changed."""
    rl = {"prompts": 4, "group_size": 4, "max_tokens": 10, "rewards": [f"{root / 'rewards.py'}:liked"],
          "epochs": 1, "minibatches": 2, "samples": 1}  # fmt: skip
    base = {"stage": stage, "model": str(root / "policy"), "data": str(root / "prompts.jsonl"), "rl": rl}
    train = {"train.steps": 4, "train.seq_len": 64, "train.batch_size": 2, "train.save_every": 1, "log.every": 1,
             "train.eval_every": 2, "train.eval_rows": 3, "optim.lr": 1e-2}  # fmt: skip
    values = small_recipe(root, folder, **(base | train))
    values["optim"] |= {"schedule": "constant", "warmup": 0, "weight_decay": 0.0}
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    values["output"] = str(folder / values["output"])
    return values
