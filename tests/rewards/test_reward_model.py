"""A reward model as a reward: its own scores of the prompt with the answer."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from groundup.data.rows import message
from groundup.infer.scoring import Scorer
from groundup.model.config import ModelConfig
from groundup.model.scored import Scored, load_scorer, save_scorer
from groundup.model.transformer import Transformer
from groundup.rewards.build import build_rewards
from groundup.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scorer")
    tokenizer = train_tokenizer(["what is better, this or that? the first is right"] * 4, 300)
    config = ModelConfig(tokenizer.vocab_size, 32, 64, 2, 2, 1, 16, max_position_embeddings=96)
    model = Scored(Transformer(config)).drop_head()
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


def test_an_answer_longer_than_the_context_is_not_judged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewards = build_rewards([{"name": "reward_model", "args": {"path": str(folder)}}], device="cpu")
    prompts = [[message("user", question)] for question in ("this?", "this?", "that?")]
    texts = ["this", "that " * 200, "right"]
    with caplog.at_level(logging.WARNING):
        totals, parts = rewards(prompts, texts, {})
        rewards(prompts, texts, {})
    (alone,) = Scorer(folder, device="cpu").score([[*prompts[0], message("assistant", "this")]])
    assert totals[0] == pytest.approx(alone) and math.isfinite(totals[2])
    assert math.isnan(totals[1]) and math.isnan(parts["reward_model"][1]) and rewards.unjudged == {"reward_model": 2}
    (record,) = caplog.records
    assert "1 of 3 answers are with their prompts longer than its context of 96 tokens" in record.message


def test_of_steps_too(folder: Path, tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(folder), load_scorer(folder)
    save_scorer(Scored(model.trunk, ("step_right",)), tmp_path)
    tokenizer.save(tmp_path)
    rewards = build_rewards([{"name": "reward_model", "args": {"path": str(tmp_path)}}], device="cpu")
    totals, _ = rewards([[message("user", "this?")]] * 2, ["this\nthat", "so\n" * 200], {})
    assert math.isfinite(totals[0]) and math.isnan(totals[1])
