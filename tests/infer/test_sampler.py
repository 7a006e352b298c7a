"""The next token: equal to transformers' processors, and each row on its own."""

from __future__ import annotations

import pytest
import torch

from groundup.errors import UserError
from groundup.infer.params import SamplingParams, params_from_dir
from groundup.infer.sampler import filtered_probs, sample, settings

VOCAB = 50


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def probs_in_place(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Renormalised probabilities by token id."""
    probs, order = filtered_probs(logits, settings(params, VOCAB))
    return torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.0, min_p=0.05),
        SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
    ],
)
def test_cuts_equal_transformers(params: SamplingParams) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    logits = logits_of(8)
    wanted = warpers(torch.zeros(8, 1, dtype=torch.int64), logits.clone()).softmax(-1)
    torch.testing.assert_close(probs_in_place(logits, [params] * 8), wanted)


def test_repetition_penalty_equals_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = logits_of(6)
    ids = torch.randint(0, VOCAB, (6, 9), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = logits.argmax(-1)
    seen = torch.zeros(6, VOCAB, dtype=torch.bool).scatter(1, ids, True)
    wanted = RepetitionPenaltyLogitsProcessor(5.0)(ids, logits.clone()).argmax(-1)
    params = [SamplingParams(repetition_penalty=5.0)] * 6
    got = sample(logits, settings(params, VOCAB), seen_BV=seen)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, logits.argmax(-1))


def test_rows_keep_their_own_settings() -> None:
    """A batch of different requests gives each what it gets alone."""
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.5, top_k=3),
        SamplingParams(temperature=0.8, top_p=0.5),
        SamplingParams(temperature=1.0, min_p=0.3),
    ]
    logits, uniform = logits_of(4), torch.tensor([0.9, 0.9, 0.7, 0.99])
    together = sample(logits, settings(params, VOCAB), uniform)
    alone = [int(sample(logits[i : i + 1], settings([p], VOCAB), uniform[i : i + 1])) for i, p in enumerate(params)]
    assert together.tolist() == alone
    assert alone[0] == int(logits[0].argmax())


def test_draws_follow_the_probabilities() -> None:
    """20,000 evenly spread draws fall on each token as often as its probability says; cut tokens never."""
    params = SamplingParams(temperature=1.0, top_k=6)
    logits = logits_of(1)
    uniform = torch.arange(20_000) / 20_000
    chosen = sample(logits.expand(20_000, -1), settings([params] * 20_000, VOCAB), uniform)
    shares = torch.bincount(chosen, minlength=VOCAB) / 20_000
    wanted = probs_in_place(logits, [params])[0]
    assert (shares - wanted).abs().max() < 1e-3
    assert ((shares > 0) == (wanted > 0)).all()


def test_the_last_draw_is_still_a_kept_token() -> None:
    """A draw just under 1 with rounding in the cumulative sum must not fall on a token that was cut."""
    params = [SamplingParams(temperature=1.0, top_k=2)]
    top = logits_of(1).topk(2).indices[0].tolist()
    assert int(sample(logits_of(1), settings(params, VOCAB), torch.tensor([1.0]))) in top


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1),
     ("min_p", 2.0), ("max_tokens", 0), ("repetition_penalty", 0.0), ("stop", ["a", ""])],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_a_folders_own_settings(tmp_path) -> None:
    file = tmp_path / "generation_config.json"
    assert params_from_dir(tmp_path).temperature == 0
    file.write_text('{"temperature": 0.6, "top_k": 20}')
    assert params_from_dir(tmp_path).temperature == 0  # as in transformers: without do_sample it is greedy
    file.write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20}')
    params = params_from_dir(tmp_path, top_k=None, max_tokens=7, top_p=0.5)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 20, 0.5, 7)
    assert params_from_dir(tmp_path, temperature=0).temperature == 0
    file.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        params_from_dir(tmp_path)
