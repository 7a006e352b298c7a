"""A reward model as a reward: its own scores of the prompt with the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from groundup.data.rows import message
from groundup.infer.scoring import Scorer
from groundup.model.config import ModelConfig
from groundup.model.scored import Scored, save_scorer
from groundup.model.transformer import Transformer
from groundup.rewards.build import build_rewards
from groundup.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scorer")
    tokenizer = train_tokenizer(["what is better, this or that? the first is right"] * 4, 300)
    model = Scored(Transformer(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 2, 1, 16))).drop_head()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_scorer(model, folder)
    tokenizer.save(folder)
    return folder


def test_scores_of_answers_with_and_without_thoughts(folder: Path) -> None:
    prompts = [[message("user", "this or that?")]] * 2
    texts = ["<think>\nhm\n</think>\n\nthis", "that"]
    whole, bare = (
        build_rewards([{"name": "reward_model", "args": {"path": str(folder), "thoughts": thoughts}}], device="cpu")
        for thoughts in (True, False)
    )
    thought = {**message("assistant", "this"), "reasoning_content": "hm"}
    expected = Scorer(folder, device="cpu").score(
        [
            [*prompts[0], thought],
            [*prompts[0], message("assistant", "that")],
            [*prompts[0], message("assistant", "this")],
        ]
    )
    assert len(set(expected)) == 3
    assert whole(prompts, texts, {})[0] == pytest.approx(expected[:2])
    assert bare(prompts, texts, {})[0] == pytest.approx([expected[2], expected[1]])
