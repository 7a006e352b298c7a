"""The next token: equal to transformers' processors and OpenAI's formulas, and each row on its own to the bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from groundup.errors import UserError
from groundup.infer.params import Grammar, SamplingParams
from groundup.infer.sampler import NO_TOKEN, SamplingState, kept, probabilities, sample, token_logprob

VOCAB = 50


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def states_of(params: Sequence[SamplingParams], prompt: Sequence[int] = (), vocab: int = VOCAB) -> list[SamplingState]:
    return [SamplingState(p, prompt, vocab) for p in params]


class Given(SamplingState):
    """A state whose random numbers are given."""

    def __init__(self, params: SamplingParams, number: float, vocab: int = VOCAB) -> None:
        super().__init__(params, [], vocab)
        self.draw = lambda: number  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_k=1000),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.0, top_p=0.9999),
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
    torch.testing.assert_close(probabilities(logits, states_of([params] * 8)), wanted)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999999])
def test_the_nucleus_is_that_of_a_full_sort(spread: float, top_p: float) -> None:
    """The shortcut that leaves most of the vocabulary unsorted changes nothing, whatever the shape of the logits."""
    vocab = 3001
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float() * spread
    probs = logits.softmax(-1)
    falling, order = probs.double().sort(descending=True)
    inside = order[(falling.cumsum(0) - falling) < top_p]
    wanted = (probs >= probs[inside].min()).nonzero().squeeze(-1)  # equal probabilities stay together
    ids, _ = kept(logits, SamplingParams(temperature=1.0, top_p=top_p))
    assert ids.tolist() == wanted.tolist()


def test_ties_with_the_last_one_stay() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert kept(logits, SamplingParams(temperature=1.0, top_k=2))[0].tolist() == [1, 2, 3]
    assert kept(logits, SamplingParams(temperature=1.0, top_p=0.6))[0].tolist() == [1, 2, 3]


def test_repetition_penalty_equals_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = logits_of(6)
    ids = torch.randint(0, VOCAB, (6, 9), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = logits.argmax(-1)
    wanted = RepetitionPenaltyLogitsProcessor(5.0)(ids, logits.clone())
    for row in range(6):  # the first five from the prompt, the others said since
        state = SamplingState(SamplingParams(repetition_penalty=5.0), ids[row, :5].tolist(), VOCAB)
        for token in ids[row, 5:].tolist():
            state.accept(token)
        torch.testing.assert_close(state.scores(logits[row]), wanted[row])
        assert sample(logits[row : row + 1], [state])[0] == [int(wanted[row].argmax())]
        assert int(wanted[row].argmax()) != int(logits[row].argmax())


def test_presence_and_frequency_penalties_are_openais() -> None:
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, over the answer alone."""
    params, said = SamplingParams(frequency_penalty=0.5, presence_penalty=-1.5), [3, 3, 7, 3, 9]
    state, logits = SamplingState(params, [1, 2, 3, 4], VOCAB), logits_of(1)[0]
    for token in said:
        state.accept(token)
    counts = Counter(said)
    wanted = [mu - counts[j] * 0.5 - (counts[j] > 0) * -1.5 for j, mu in enumerate(logits.tolist())]
    torch.testing.assert_close(state.scores(logits), torch.tensor(wanted))


def test_logit_bias() -> None:
    logits = logits_of(1)
    best, other = int(logits.argmax()), int(logits.argmin())
    assert sample(logits, states_of([SamplingParams(logit_bias={best: -100})]))[0] != [best]
    assert sample(logits, states_of([SamplingParams(logit_bias={other: 100})]))[0] == [other]
    probs = probabilities(logits, states_of([SamplingParams(temperature=1.0, logit_bias={other: math.log(2)})]))[0]
    plain = logits[0].softmax(-1)
    assert probs[other] / probs[best] == pytest.approx(2 * plain[other] / plain[best])
    with pytest.raises(UserError, match="logit_bias: token 50 is outside the vocabulary of 50"):
        states_of([SamplingParams(logit_bias={1: 1, 50: 1})])


MANY = [
    SamplingParams(),
    SamplingParams(temperature=1.5, top_k=3, seed=1),
    SamplingParams(temperature=0.8, top_p=0.5, seed=2),
    SamplingParams(temperature=1.0, min_p=0.3, seed=3),
    SamplingParams(temperature=1.0, seed=4),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(temperature=0.7, repetition_penalty=1.1, frequency_penalty=0.3, presence_penalty=0.2, seed=5),
    SamplingParams(temperature=1.2, top_k=50, top_p=0.95, min_p=0.01, logit_bias={7: 3.0}, seed=6, logprobs=4),
    SamplingParams(logprobs=2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    vocab, prompt = 5003, [1, 7, 9]
    logits = logits_of(len(MANY), vocab=vocab).to(dtype)
    together, alone = states_of(MANY, prompt, vocab), states_of(MANY, prompt, vocab)
    for _ in range(3):  # the second and third step with tokens accepted
        probs, (ids, logprobs) = probabilities(logits, together), sample(logits, together)
        order = torch.randperm(len(MANY), generator=torch.Generator().manual_seed(0))
        assert torch.equal(probabilities(logits[order], [together[i] for i in order]), probs[order])
        for row, state in enumerate(alone):
            mine = logits[row : row + 1].clone()
            assert torch.equal(probabilities(mine, [state])[0], probs[row])
            assert sample(mine, [state]) == ([ids[row]], [logprobs[row]])
            state.accept(ids[row]), together[row].accept(ids[row])


def test_draws_follow_the_probabilities() -> None:
    """Evenly spread draws fall on each token as often as its probability says; cut tokens never."""
    params, draws = SamplingParams(temperature=1.0, top_k=6), 4000
    logits = logits_of(1)
    ids, _ = sample(logits.expand(draws, -1), [Given(params, i / draws) for i in range(draws)])
    shares = torch.bincount(torch.tensor(ids), minlength=VOCAB) / draws
    wanted = probabilities(logits, states_of([params]))[0]
    assert (shares - wanted).abs().max() <= 1 / draws
    assert ((shares > 0) == (wanted > 0)).all()
    assert wanted.count_nonzero() == 6


def test_the_first_and_the_last_draw_are_kept_tokens() -> None:
    """A draw of 0 must not fall on a first token of probability 0, nor one just under 1 behind the last."""
    for seed in range(20):
        logits = logits_of(1, seed, 1000)
        logits[0, :3] = logits[0, -3:] = -torch.inf
        for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=0.3, top_p=0.9)):
            for number in (0.0, 1 - 2**-53):
                ids, _ = sample(logits, [Given(params, number, 1000)])
                assert 3 <= ids[0] < 997


def test_seeds() -> None:
    def answer(seed: int | None, index: int = 0) -> list[int]:
        state = SamplingState(SamplingParams(temperature=1.0, seed=seed), [], VOCAB, index=index)
        flat = torch.zeros(1, VOCAB)
        return [sample(flat, [state])[0][0] for _ in range(20)]

    before = torch.get_rng_state()
    assert answer(7) == answer(7)
    assert answer(7, index=2) == answer(9)
    assert len({tuple(answer(seed)) for seed in (0, 1, -1, 2**32, 2**63 - 1, -(2**63), None, None)}) == 8
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_without_numbers_harms_no_other() -> None:
    logits = logits_of(5)
    logits[1, 7], logits[2, 0] = torch.nan, torch.inf
    logits[3, :] = -torch.inf
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=1, logprobs=1)):
        ids, logprobs = sample(logits, states_of([params] * 5))
        alone = [sample(logits[row : row + 1], states_of([params]))[0][0] for row in (0, 4)]
        assert ids == [alone[0], NO_TOKEN, NO_TOKEN, NO_TOKEN, alone[1]]
        assert logprobs[1:4] == [None] * 3


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(3)
    odd = {"temperature": 3.0, "top_k": 2, "logit_bias": {4: 9.0}, "repetition_penalty": 2.0, "seed": 0}
    params = [SamplingParams(logprobs=5, **odd), SamplingParams(logprobs=0), SamplingParams()]  # type: ignore[arg-type]
    ids, logprobs = sample(logits, states_of(params, [1, 2]))
    wanted = logits.log_softmax(-1)
    first, second, third = logprobs
    assert first is not None and second is not None and third is None
    assert (first.id, first.logprob) == (ids[0], pytest.approx(wanted[0, ids[0]].item()))
    likeliest = wanted[0].sort(descending=True)
    assert [token for token, _ in first.top] == likeliest.indices[:5].tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(likeliest.values[:5].tolist())
    assert second.top == ()
    assert second.logprob == pytest.approx(wanted[1].max().item())
    assert len(token_logprob(logits[0], 3, 1000).top) == VOCAB


def test_greedy_rows_have_all_probability_on_their_token() -> None:
    params = [SamplingParams(), SamplingParams(logit_bias={9: 100}), SamplingParams(temperature=1e-9)]
    logits = logits_of(3)
    ids, _ = sample(logits, states_of(params))
    assert ids == [int(logits[0].argmax()), 9, int(logits[2].argmax())]
    assert torch.equal(probabilities(logits, states_of(params)), torch.eye(VOCAB)[ids])


def test_plain() -> None:
    assert all(state.plain for state in states_of([SamplingParams(), SamplingParams(logprobs=3, seed=1, top_k=5)]))
    changed = [{"temperature": 1.0}, {"logit_bias": {1: 1}}, {"repetition_penalty": 1.1}, {"presence_penalty": 1.0}]
    assert not any(state.plain for state in states_of([SamplingParams(**c) for c in changed]))  # type: ignore[arg-type]


def test_states_work_inside_and_outside_of_inference_mode() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={1: 1}, seed=0)
    with torch.inference_mode():
        state = SamplingState(params, [1], VOCAB)
        token = sample(logits_of(1), [state])[0][0]
    state.accept(token)
    assert 0 <= sample(logits_of(1), [state])[0][0] < VOCAB


class OddTokens:
    """Stands in for a compiler and its matcher: odd ids below `width`, three times."""

    def __init__(self, width: int) -> None:
        self.width, self.left = width, 3

    def start(self, grammar: Grammar) -> OddTokens:
        return self

    @property
    def done(self) -> bool:
        return self.left == 0

    def allowed(self) -> torch.Tensor:
        return torch.arange(self.width) % 2 == 1

    def accept(self, token: int) -> None:
        self.left -= 1


@pytest.mark.parametrize("width", [VOCAB - 13, VOCAB, VOCAB + 13])
def test_a_grammar_comes_before_all_that_draws(width: int) -> None:
    """Also where logits are wider than the tokenizer, as padded models have them, or narrower."""
    free, logits = SamplingParams(temperature=2.0, seed=1, grammar=Grammar("json_object")), logits_of(1)
    state = SamplingState(free, [], VOCAB, OddTokens(width))  # type: ignore[arg-type]
    probs = probabilities(logits, [state])[0]
    assert probs.nonzero().squeeze(-1).tolist() == list(range(1, min(width, VOCAB), 2))
    for _ in range(3):
        assert not state.grammar_done
        (token,), _ = sample(logits, [state])
        assert token % 2 == 1
        state.accept(token)
    assert state.grammar_done
    greedy = SamplingParams(grammar=Grammar("json_object"), logit_bias={2: 100})
    state = SamplingState(greedy, [], VOCAB, OddTokens(width))  # type: ignore[arg-type]
    assert not state.plain
    assert sample(logits, [state])[0][0] % 2 == 1


def test_a_grammar_needs_a_compiler() -> None:
    with pytest.raises(ValueError, match="GrammarCompiler"):
        SamplingState(SamplingParams(grammar=Grammar("json_object")), [], VOCAB)
