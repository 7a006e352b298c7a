"""A reward model that is asked: the same number alone and among others, the number that training sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.data.rows import message
from groundup.data.steps import render_steps
from groundup.errors import UserError
from groundup.infer.scoring import Scorer
from groundup.model.config import ModelConfig
from groundup.model.scored import Scored, begin_scored, load_scorer, save_scorer
from groundup.model.transformer import Transformer
from groundup.ops.native import native
from groundup.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["what is better, this or that? the first is right, and so on and on"] * 4, 300)


def scored(tokenizer: Tokenizer, *labels: str, seed: int = 0) -> Scored:
    torch.set_num_threads(1)
    config = ModelConfig(tokenizer.vocab_size, 96, 160, 2, 4, 2, 24, max_position_embeddings=192)
    generator = torch.Generator().manual_seed(seed)
    model = Scored(Transformer(config), labels or ("reward",)).drop_head()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(spread if parameter.ndim > 1 else 1 + spread)
    return model.eval()


def chat(question: str, answer: str, **more: Any) -> list[dict[str, Any]]:
    return [message("user", question), {**message("assistant", answer), **more}]


CHATS = [chat("this?", "that " * n) for n in (1, 30, 4, 9, 2, 17)]
CHATS.append(chat("and so on?", "right", reasoning_content="so"))


def test_a_score_is_the_last_tokens_and_does_not_depend_on_the_neighbours(tokenizer: Tokenizer) -> None:
    model = scored(tokenizer)
    scorer = Scorer(model, tokenizer)
    together = scorer.score(CHATS)
    with torch.no_grad():
        ids = [tokenizer.render(said).ids for said in CHATS]
        alone = [model.scores_BT(torch.tensor([one]))[0, -1].item() for one in ids]
    assert together == pytest.approx(alone, abs=1e-4)
    assert len(set(together)) == len(CHATS)
    for tokens in (1, 40, 100):
        assert Scorer(scored(tokenizer), tokenizer, tokens=tokens).score(CHATS) == pytest.approx(together, abs=1e-5)


@pytest.mark.skipif(native("decode") is None, reason="without a C compiler torch's own products answer")
def test_on_a_cpu_it_is_the_same_bits_whoever_else_is_scored(tokenizer: Tokenizer) -> None:
    scorer = Scorer(scored(tokenizer), tokenizer)
    assert scorer._fused is not None, "the engine's kernels promise it for every shape"
    together = scorer.score(CHATS)
    assert [scorer.score([said])[0] for said in CHATS] == together
    assert scorer.score(CHATS[::-1])[::-1] == together
    assert Scorer(scored(tokenizer), tokenizer, tokens=50).score(CHATS * 3) == together * 3


def test_it_opens_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_scorer(scored(tokenizer), tmp_path)
    tokenizer.save(tmp_path)
    assert Scorer(tmp_path, device="cpu").score(CHATS) == Scorer(scored(tokenizer), tokenizer).score(CHATS)


def test_a_model_that_transformers_computes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from groundup.model.io import load_model

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "n_embd": 32, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, n_positions=192, initializer_range=0.3)).save_pretrained(tmp_path)
    model = begin_scored(load_model(tmp_path), 0)
    scorer = Scorer(model, tokenizer)
    alone = [scorer.score([said])[0] for said in CHATS]
    assert scorer.score(CHATS) == pytest.approx(alone, abs=1e-5) and len(set(alone)) == len(CHATS)


def test_steps_are_scored_as_far_as_they_are_written(tokenizer: Tokenizer) -> None:
    scorer = Scorer(scored(tokenizer, "step_right"), tokenizer)
    prompt, steps = [message("user", "what is better?")], ["this is", "and that", "so on"]
    (whole,) = scorer.score_steps([(prompt, steps)])
    begun = scorer.score_steps([(prompt, steps[:1]), (prompt, steps[:2])])
    assert len(whole) == 3 and begun[1] == pytest.approx(whole[:2], abs=1e-5) and begun[0] == pytest.approx(whole[:1])
    ids, ends = render_steps(tokenizer, prompt, steps)
    with torch.no_grad():
        wanted = scorer.model.scores_BT(torch.tensor([ids]))[0, ends]
    assert whole == pytest.approx(wanted.tolist(), abs=1e-4)
    said = [*prompt, message("assistant", "\n".join(steps))]
    assert scorer.score([said]) == [min(whole)], "a finished answer is as right as its weakest line"
    assert len(scorer.score([[*prompt, message("assistant", "")]])) == 1


def test_nothing_asked_is_nothing_answered(tokenizer: Tokenizer) -> None:
    assert Scorer(scored(tokenizer), tokenizer).score([]) == []


def test_too_long_and_too_many_numbers_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"conversation 2: \d+ tokens, and the reward model takes 1 to 192"):
        Scorer(scored(tokenizer), tokenizer).score([CHATS[0], chat("this?", "that " * 200)])
    with pytest.raises(UserError, match=r"has 2 numbers \(bad, good\), not one score"):
        Scorer(scored(tokenizer, "bad", "good"), tokenizer)


def test_the_folder_says_what_a_number_means(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_scorer(scored(tokenizer, "step_right"), tmp_path)
    tokenizer.save(tmp_path)
    assert Scorer(tmp_path, device="cpu").stepwise and load_scorer(tmp_path).labels == ("step_right",)
