"""The engine under load answers what the model says to each prompt alone, token for token, and leaks nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from groundup.errors import UserError
from groundup.infer.engine import Engine, EngineSettings, Request
from groundup.infer.graphs import DecodeGraphs
from groundup.infer.params import SamplingParams
from groundup.infer.speculate import ModelDrafter, NgramDrafter
from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer

# Few blocks: of what some twenty requests want, about a quarter. Small steps: prompts are read in pieces.
TIGHT = EngineSettings(block_size=4, num_blocks=40, max_batch_tokens=16, max_sequences=12)


def alone(model: Transformer, prompt: list[int], new: int) -> list[int]:
    """The plainest generation there is: all tokens through the model, the likeliest next, again."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def many_prompts(vocab_size: int, number: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 60 tokens; a third begin like another one."""
    random = Random(seed)
    prompts: list[list[int]] = []
    for _ in range(number):
        shared = random.choice(prompts)[: random.randrange(60)] if prompts and random.random() < 0.35 else []
        fresh = [random.randrange(5, vocab_size) for _ in range(random.randrange(1, 61 - len(shared)))]
        prompts.append(shared + fresh)
    return prompts


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams], seed: int = 0) -> list[Request]:
    """Let the requests arrive one by one between the steps, in random order; answers in the order of the prompts."""
    random = Random(seed)
    order = random.sample(range(len(prompts)), len(prompts))
    requests: dict[int, Request] = {}
    while order or engine.has_work:
        for _ in range(random.randrange(4)):
            if order:
                at = order.pop()
                requests[at] = engine.add(prompts[at], params[at])
        engine.step()
    return [requests[at] for at in range(len(prompts))]


def nothing_leaked(engine: Engine) -> bool:
    blocks = engine.blocks
    return blocks.used == 0 and blocks.available == blocks.num_blocks and not any(blocks.references)


@pytest.mark.parametrize("sharing", [True, False])
def test_two_hundred_requests_in_any_order(model: Transformer, tokenizer: Tokenizer, sharing: bool) -> None:
    """Preempted, read in pieces, sharing beginnings: greedy answers are those of one-by-one generation."""
    engine = Engine(model, tokenizer, replace(TIGHT, prefix_sharing=sharing))
    prompts = many_prompts(tokenizer.vocab_size, 200)
    params = [SamplingParams(max_tokens=1 + i % 23, ignore_eos=True) for i in range(len(prompts))]
    requests = run(engine, prompts, params)
    for request, prompt, wanted in zip(requests, prompts, params, strict=True):
        (completion,) = request.completions()
        assert completion.ids == alone(model, prompt, wanted.max_tokens)
        assert completion.finish_reason == "length"
    stats = engine.stats()
    assert stats["preemptions"] > 10
    assert (stats["cached_tokens"] > 0) == sharing
    assert stats["generated_tokens"] == sum(p.max_tokens for p in params)
    assert nothing_leaked(engine)


def test_the_plain_path_answers_the_same(model: Transformer, tokenizer: Tokenizer, monkeypatch) -> None:
    """Without a C compiler, as on CUDA: the model's own blocks over the paged cache."""
    monkeypatch.setattr("groundup.infer.fused.native", lambda name: None)
    monkeypatch.setattr("groundup.ops.paged.native", lambda name: None)
    monkeypatch.setattr("groundup.ops.linear.native", lambda name: None)
    engine = Engine(model, tokenizer, TIGHT)
    for cache in (engine.runner.cache.keys, engine.runner.cache.values):
        cache.fill_(torch.nan)  # as memory that nobody has written, or a broken request before, may hold
    prompts = many_prompts(tokenizer.vocab_size, 20)
    requests = run(engine, prompts, [SamplingParams(max_tokens=12, ignore_eos=True)] * 20)
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.completions()[0].ids == alone(model, prompt, 12)


def test_recorded_steps_answer_the_same(model: Transformer, tokenizer: Tokenizer, monkeypatch) -> None:
    """What a CUDA graph does, with a stand-in that runs the same function over the same tensors again."""
    for place in ("infer.fused", "ops.paged", "ops.linear"):
        monkeypatch.setattr(f"groundup.{place}.native", lambda name: None)
    recorded = []

    def record(function):
        out = function()
        recorded.append(1)
        return lambda: out.copy_(function()), out

    engine = Engine(model, tokenizer, TIGHT)
    engine.runner.graphs = DecodeGraphs(model, TIGHT.num_blocks, record)
    prompts = many_prompts(tokenizer.vocab_size, 25, seed=2)
    requests = run(engine, prompts, [SamplingParams(max_tokens=12, ignore_eos=True)] * 25)
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.completions()[0].ids == alone(model, prompt, 12)
    assert 2 < len(recorded) < 20


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_other_families(family: str, tokenizer: Tokenizer) -> None:
    """No QK-norm; biases on q, k and v; an untied head; sizes that no vector register divides."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 3, num_hidden_layers=2, head_dim=10, model_type=family,
        max_position_embeddings=256, tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.25
    prompts = many_prompts(tokenizer.vocab_size, 10)
    wanted = [alone(model, prompt, 10) for prompt in prompts]
    requests = run(Engine(model, tokenizer, TIGHT), prompts, [SamplingParams(max_tokens=10, ignore_eos=True)] * 10)
    assert [request.completions()[0].ids for request in requests] == wanted


def test_sampled_answers_do_not_depend_on_the_load(model: Transformer, tokenizer: Tokenizer) -> None:
    """Nor do their logprobs, to the last bit: no sum is made in another order because others are there."""
    prompts = many_prompts(tokenizer.vocab_size, 30, seed=3)
    params = [
        SamplingParams(
            max_tokens=15, temperature=0.8 + i % 3, top_p=0.9, seed=i, frequency_penalty=i % 2, n=1 + i % 3, logprobs=2
        )
        for i in range(30)
    ]
    crowded = run(Engine(model, tokenizer, TIGHT), prompts, params)
    for prompt, wanted, request in zip(prompts, params, crowded, strict=True):
        (quiet,) = run(Engine(model, tokenizer, EngineSettings(block_size=4)), [prompt], [wanted])
        assert request.completions() == quiet.completions()


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_guessing_changes_nothing(model: Transformer, tokenizer: Tokenizer, temperature: float) -> None:
    """With a draft model that is often right, and with looked-up endings: the same tokens, in fewer steps."""
    rough = Transformer(model.config)
    generator = torch.Generator().manual_seed(5)
    for ours, theirs in zip(rough.parameters(), model.parameters(), strict=True):
        ours.data = theirs.data + 0.003 * torch.randn(theirs.shape, generator=generator)
    prompts = [prompt * 2 for prompt in many_prompts(tokenizer.vocab_size, 12, seed=4)]
    params = [SamplingParams(max_tokens=25, temperature=temperature, seed=i, ignore_eos=True) for i in range(12)]
    plain = Engine(model, tokenizer, TIGHT)
    wanted = [request.completions() for request in run(plain, prompts, params)]
    for drafter in (ModelDrafter(rough, tokens=3), NgramDrafter(tokens=3, shortest=1)):
        engine = Engine(model, tokenizer, TIGHT, drafter)
        assert [request.completions() for request in run(engine, prompts, params)] == wanted
        assert engine.stats()["drafted"] > 0
        assert nothing_leaked(engine)
    quick = Engine(model, tokenizer, drafter=ModelDrafter(rough, tokens=3))
    assert [r.completions() for r in run(quick, prompts, params)] == wanted
    stats = quick.stats()
    assert stats["accepted"] > 0.3 * stats["drafted"] if temperature == 0 else stats["accepted"] > 0


def test_a_draft_of_another_vocabulary_is_refused(model: Transformer, tokenizer: Tokenizer) -> None:
    other = Transformer(replace(model.config, vocab_size=99))
    with pytest.raises(UserError, match="99 tokens"):
        Engine(model, tokenizer, drafter=ModelDrafter(other))


def test_several_answers_share_the_prompt(model: Transformer, tokenizer: Tokenizer) -> None:
    """Eight answers: the prompt is computed once, its last, half-full block copied when an answer writes to it."""
    engine = Engine(model, tokenizer, EngineSettings(block_size=4, num_blocks=100))
    prompt = many_prompts(tokenizer.vocab_size, 1)[0][:10] + [9] * 13
    request = engine.add(prompt, SamplingParams(max_tokens=6, temperature=1.0, n=8, seed=1, ignore_eos=True))
    engine.step()
    assert engine.blocks.used == len(prompt) // 4 + 1
    while engine.has_work:
        engine.step()
    answers = request.completions()
    assert [a.index for a in answers] == list(range(8))
    assert len({tuple(a.ids) for a in answers}) > 4
    for index in (0, 7):
        engine = Engine(model, tokenizer)
        (one,) = run(engine, [prompt], [SamplingParams(max_tokens=6, temperature=1.0, seed=1 + index, ignore_eos=True)])
        assert one.completions()[0].ids == answers[index].ids
    assert nothing_leaked(engine)


def test_prefix_sharing_is_within_a_tenant(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    prompt, params = list(range(10, 60)), SamplingParams(max_tokens=2)

    def cached(tenant: str) -> int:
        request = engine.add(prompt, params, tenant=tenant)
        while engine.has_work:
            engine.step()
        return request.cached_tokens

    assert [cached("a"), cached("a"), cached("b"), cached("b")] == [0, 48, 0, 48]


def test_the_longest_unused_beginning_is_forgotten_first(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, EngineSettings(block_size=4, num_blocks=12))

    def cached(first: int) -> int:
        request = engine.add([first] * 17, SamplingParams(max_tokens=1))
        while engine.has_work:
            engine.step()
        return request.cached_tokens

    assert [cached(token) for token in (10, 11, 10)] == [0, 0, 16]
    assert cached(12) == 0  # takes the blocks of 11
    assert cached(10) == 16
    assert cached(11) < 16


def test_abort_frees_blocks_at_once(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, TIGHT)
    params = SamplingParams(max_tokens=50, n=2, ignore_eos=True)
    gone, stays = engine.add([7] * 20, params), engine.add([8] * 5, SamplingParams(max_tokens=4))
    waiting = engine.add([9] * 20, params)
    for _ in range(4):
        engine.step()
    before = engine.blocks.used
    engine.abort(gone)
    engine.abort(waiting)
    assert engine.blocks.used < before
    assert [c.finish_reason for c in gone.completions()] == ["abort"] * 2
    while engine.has_work:
        engine.step()
    assert stays.completions()[0].ids == alone(model, [8] * 5, 4)
    engine.abort(stays)  # nothing happens
    assert stays.completions()[0].finish_reason != "abort"
    assert nothing_leaked(engine)


def test_logprobs_are_the_models_own(model: Transformer, tokenizer: Tokenizer) -> None:
    prompt = many_prompts(tokenizer.vocab_size, 1, seed=8)[0]
    params = SamplingParams(max_tokens=9, temperature=1.5, seed=2, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    engine = Engine(model, tokenizer, TIGHT)
    for _ in range(2):  # the second time the prompt is in the cache, and is computed all the same
        (request,) = run(engine, [prompt], [params])
        (answer,) = request.completions()
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([prompt + answer.ids]))[0].log_softmax(-1)
        said = [*request.prompt_logprobs, *answer.logprobs]
        assert [one.id for one in said] == (prompt + answer.ids)[1:]
        for logprobs_V, one in zip(logprobs_TV, said, strict=False):
            assert one.logprob == pytest.approx(logprobs_V[one.id].item(), abs=1e-4)
            assert [token for token, _ in one.top] == logprobs_V.topk(len(one.top)).indices.tolist()
        assert (len(request.prompt_logprobs[0].top), len(answer.logprobs[0].top)) == (2, 3)


def test_embeddings(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, TIGHT)
    beside = engine.add([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True))
    prompts = many_prompts(tokenizer.vocab_size, 5)
    found = engine.embed(prompts)
    for prompt, vector in zip(prompts, found, strict=True):
        with torch.no_grad():
            mean = model.hidden(torch.tensor([prompt]))[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert [token for delta in deltas for token in delta.ids] == beside.completions()[0].ids  # none was lost
    assert nothing_leaked(engine)


def test_a_broken_model_ends_its_requests_with_an_error(tokenizer: Tokenizer, model: Transformer) -> None:
    broken = Transformer(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    engine = Engine(broken, tokenizer)
    (request,) = run(engine, [[5, 6]], [SamplingParams()])
    assert request.completions()[0].finish_reason == "error"
    assert "check the model's weights" in request.error
    assert nothing_leaked(engine)


def test_what_cannot_be_answered_is_refused(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, EngineSettings(block_size=4, num_blocks=10))
    for prompt, said in [
        ([], "is empty"),
        ([tokenizer.vocab_size + 1000], "no token id"),
        ([5] * 256, "256 tokens leave no room in the model's context of 256"),
        ([5] * 40, "40 tokens do not fit the cache of 40"),
    ]:
        with pytest.raises(UserError, match=said):
            engine.add(prompt, SamplingParams())
    with pytest.raises(UserError, match="at most 128"):
        engine.add([5], SamplingParams(n=129))
    assert not engine.has_work
    cut = Engine(model, tokenizer, EngineSettings(truncate_prompt=True)).add([4] * 100 + [5] * 255, SamplingParams())
    assert cut.prompt_ids == [5] * 255
    (last,) = run(engine, [[5] * 39], [SamplingParams(ignore_eos=True)])
    assert len(last.completions()[0].ids) == 1  # all that the cache has room for


def test_saving_after_serving(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The engine joins matrices in place; the parameters keep their values and are saved whole."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Engine(model, tokenizer)
    Engine(model, tokenizer)
    save_model(model, tmp_path)
    from groundup.model.io import load_model

    after = load_model(tmp_path).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
