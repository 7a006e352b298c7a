"""A model with a soft prompt in the engine: what it says to each prompt alone, step by step, whatever the load."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from groundup.errors import UserError
from groundup.eval.bpb import measure_files
from groundup.infer.engine import Engine, EngineSettings, Request
from groundup.infer.generate import generate
from groundup.infer.graphs import DecodeGraphs
from groundup.infer.params import SamplingParams
from groundup.infer.speculate import ModelDrafter, NgramDrafter
from groundup.model.io import load_model
from groundup.model.prefix import record
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer

# Blocks of 4: prefixes that end inside the first block, at a block's end, and inside a later one.
LENGTHS = (3, 8, 21)
TIGHT = EngineSettings(block_size=4, num_blocks=26, max_batch_tokens=16, max_sequences=12)


def prompted(model: Transformer, tokens: int, seed: int = 0) -> Transformer:
    """The model with so many virtual tokens before everything."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.soft_prefix = record(model, torch.randn(tokens, model.config.hidden_size, generator=generator))
    return model


def alone(model: Transformer, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def many_prompts(vocab_size: int, number: int, seed: int = 0) -> list[list[int]]:
    """1 to 50 tokens; a third begin like another one."""
    random = Random(seed)
    prompts: list[list[int]] = []
    for _ in range(number):
        shared = random.choice(prompts)[: random.randrange(50)] if prompts and random.random() < 0.35 else []
        prompts.append(shared + [random.randrange(5, vocab_size) for _ in range(random.randrange(1, 51 - len(shared)))])
    return prompts


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Request]:
    """The requests of two tenants arrive between the steps; answers in the order of the prompts."""
    random, waiting = Random(0), list(enumerate(zip(prompts, params, strict=True)))
    requests: list[Request] = []
    while waiting or engine.has_work:
        for _ in range(random.randrange(6)):
            if waiting:
                at, (prompt, wanted) = waiting.pop(0)
                requests.append(engine.add(prompt, wanted, tenant=at % 2))
        engine.step()
    return requests


def record_steps(function):
    """What a CUDA graph does: the same function over the same tensors again."""
    out = function()
    return lambda: out.copy_(function()), out


def only_the_prefix_is_left(engine: Engine) -> bool:
    held = [1 if block in engine.blocks.prefix_blocks else 0 for block in range(engine.blocks.num_blocks)]
    return engine.blocks.references == held and engine.blocks.used == len(engine.blocks.prefix_blocks)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("sharing", [True, False])
def test_under_load(model: Transformer, tokenizer: Tokenizer, tokens: int, sharing: bool) -> None:
    """Preempted, read in pieces, sharing beginnings; and nobody writes to the prefix."""
    model = prompted(model, tokens)
    engine = Engine(model, tokenizer, replace(TIGHT, prefix_sharing=sharing))
    prompts = many_prompts(tokenizer.vocab_size, 40)
    params = [SamplingParams(max_tokens=1 + i % 17, ignore_eos=True) for i in range(40)]
    caches = (engine.runner.cache.keys, engine.runner.cache.values)
    before = [cache[:, engine.blocks.prefix_blocks].clone() for cache in caches]
    requests = run(engine, prompts, params)
    for request, prompt, wanted in zip(requests, prompts, params, strict=True):
        (completion,) = request.completions()
        assert completion.ids == alone(model, prompt, wanted.max_tokens)
        assert completion.prompt_ids == prompt
        assert request.cached_tokens < len(prompt)
    stats = engine.stats()
    assert stats["preemptions"] > 2
    assert (stats["cached_tokens"] > 0) == sharing
    assert stats["prompt_tokens"] == sum(map(len, prompts))
    assert only_the_prefix_is_left(engine)
    for cache, old in zip(caches, before, strict=True):
        at = torch.tensor(engine.blocks.prefix_blocks)
        full, rest = divmod(tokens, 4)
        assert torch.equal(cache[:, at[:full]], old[:, :full])
        assert rest == 0 or torch.equal(cache[:, at[full], :, :rest], old[:, full, :, :rest])


@pytest.mark.parametrize("recorded", [False, True])
def test_the_plain_path(model: Transformer, tokenizer: Tokenizer, monkeypatch, recorded: bool) -> None:
    """Without the C kernels, as on CUDA; also with recorded steps; memory that nobody wrote may hold anything."""
    for place in ("infer.fused", "ops.paged", "ops.linear"):
        monkeypatch.setattr(f"groundup.{place}.native", lambda name: None)
    model = prompted(model, 6)
    engine = Engine(model, tokenizer, TIGHT)
    for cache in (engine.runner.cache.keys, engine.runner.cache.values):
        cache.fill_(torch.nan)
    engine.runner.hold(model.soft_prefix, engine.blocks.prefix_blocks)
    if recorded:
        engine.runner.graphs = DecodeGraphs(model, TIGHT.num_blocks, record_steps)
    prompts = many_prompts(tokenizer.vocab_size, 15, seed=2)
    requests = run(engine, prompts, [SamplingParams(max_tokens=9, ignore_eos=True)] * 15)
    assert [r.completions()[0].ids for r in requests] == [alone(model, prompt, 9) for prompt in prompts]


def test_several_answers_to_one_prompt(model: Transformer, tokenizer: Tokenizer) -> None:
    """They share the prompt's blocks and the prefix's; crowded or not, each is the same."""
    model, prompts = prompted(model, 6), many_prompts(tokenizer.vocab_size, 12, seed=1)
    params = [SamplingParams(max_tokens=8, temperature=1.0, n=3, seed=i, ignore_eos=True) for i in range(12)]
    engine = Engine(model, tokenizer, TIGHT)
    crowded = run(engine, prompts, params)
    for prompt, wanted, request in zip(prompts, params, crowded, strict=True):
        assert request.completions() == generate(model, tokenizer, [prompt], wanted)
    assert only_the_prefix_is_left(engine)
    engine = Engine(model, tokenizer, EngineSettings(block_size=4, num_blocks=40))
    engine.add(list(range(5, 16)), SamplingParams(max_tokens=4, n=3, temperature=1.0, ignore_eos=True))
    engine.step()
    assert engine.blocks.used == 2 + 4  # the prefix: 4 + 2 tokens; the prompt: 2 beside a copy of those 2, 4, 4 and 1


def test_guesses_change_nothing(model: Transformer, tokenizer: Tokenizer) -> None:
    """A draft model that knows nothing of the prompt, and one that has it."""
    model = prompted(model, 6)
    bare = copy.deepcopy(model)
    bare.soft_prefix = None
    prompts = [prompt * 2 for prompt in many_prompts(tokenizer.vocab_size, 10, seed=4)]
    params = [SamplingParams(max_tokens=20, ignore_eos=True)] * 10
    wanted = [alone(model, prompt, 20) for prompt in prompts]
    accepted = []
    for drafter in (ModelDrafter(copy.deepcopy(model), 3), ModelDrafter(bare, 3), NgramDrafter(3, shortest=1)):
        engine = Engine(model, tokenizer, replace(TIGHT, num_blocks=40), drafter)
        assert [r.completions()[0].ids for r in run(engine, prompts, params)] == wanted
        assert only_the_prefix_is_left(engine)
        engine = Engine(model, tokenizer, EngineSettings(block_size=4), drafter)
        assert [r.completions()[0].ids for r in run(engine, prompts, params)] == wanted
        accepted.append(engine.stats()["accepted"] / engine.stats()["drafted"])
    assert accepted[0] == 1 > accepted[1] > 0


@pytest.mark.parametrize("tokens", LENGTHS)
def test_tenants_share_the_prefix_alone(model: Transformer, tokenizer: Tokenizer, tokens: int) -> None:
    engine = Engine(prompted(model, tokens), tokenizer, EngineSettings(block_size=4, num_blocks=60))
    found = []
    for tenant in ("one", "other", "other", "one"):
        request = engine.add(list(range(9, 26)), SamplingParams(max_tokens=2, ignore_eos=True), tenant=tenant)
        while engine.has_work:
            engine.step()
        found.append(request.cached_tokens)
    ours = (tokens + 16) // 4 * 4 - tokens  # in full blocks, but for the last token
    assert found == [0, 0, ours, ours]


def test_what_the_prompt_is_read_for(model: Transformer, tokenizer: Tokenizer) -> None:
    """Logprobs of the prompt's tokens, and embeddings: of real tokens only, behind the prefix."""
    model, prompt = prompted(model, 6), list(range(7, 30))
    engine = Engine(model, tokenizer, TIGHT)
    with torch.no_grad():
        hidden_TD = model.hidden(torch.tensor([prompt]))[0]
        logp_TV = (hidden_TD @ model.head_weight.T).log_softmax(-1)
    request = engine.add(prompt, SamplingParams(max_tokens=1, prompt_logprobs=1))
    while engine.has_work:
        engine.step()
    expected = [float(logp_TV[i, token]) for i, token in enumerate(prompt[1:])]
    assert [entry.logprob for entry in request.prompt_logprobs] == pytest.approx(expected, abs=1e-4)
    mean_D = torch.nn.functional.normalize(hidden_TD.mean(0), dim=-1)
    torch.testing.assert_close(engine.embed([prompt])[0], mean_D, rtol=0, atol=1e-5)
    assert only_the_prefix_is_left(engine)


def test_the_context_shrinks(model: Transformer, tokenizer: Tokenizer) -> None:
    """By the prompt's length: 256 - 21 places are left, and answers fill them to the last."""
    engine = Engine(prompted(model, 21), tokenizer, EngineSettings(max_sequences=1))
    assert engine.context == 235
    with pytest.raises(UserError, match="235 tokens leave no room in the model's context of 235"):
        engine.add([5] * 235, SamplingParams())
    request = engine.add([5] * 230, SamplingParams(max_tokens=100, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert len(request.completions()[0].ids) == 5
    assert request.completions()[0].finish_reason == "length"


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_cache_is_used_to_its_last_block(model: Transformer, tokenizer: Tokenizer, tokens: int) -> None:
    """One sequence that takes all that the prefix leaves."""
    model = prompted(model, tokens)
    engine = Engine(model, tokenizer, EngineSettings(block_size=4, num_blocks=12))
    room = (12 - math.ceil(tokens / 4)) * 4 - tokens % 4
    with pytest.raises(UserError, match=f"{room} tokens do not fit the cache of {room}"):
        engine.add([7] * room, SamplingParams())
    request = engine.add([7] * 9, SamplingParams(max_tokens=200, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert request.completions()[0].ids == alone(model, [7] * 9, room - 9)


def test_a_prompt_too_long_for_the_machine(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="soft prompt of 21 tokens fills the cache"):
        Engine(prompted(model, 21), tokenizer, EngineSettings(block_size=4, num_blocks=6))
    with pytest.raises(UserError, match="255 tokens leave no room in the model's context of 256"):
        Engine(prompted(model, 255), tokenizer)


def test_quantised(model: Transformer, tokenizer: Tokenizer) -> None:
    """The prefix stays what the whole model made of it; 8 bits say nearly the same."""
    model = prompted(model, 6)
    (completion,) = generate(
        copy.deepcopy(model), tokenizer, [[7, 8, 9]], SamplingParams(max_tokens=1, logprobs=1),
        EngineSettings(quantize="int8"),
    )  # fmt: skip
    with torch.no_grad():
        logp = model(torch.tensor([[7, 8, 9]]))[0, -1].log_softmax(-1)
    assert completion.logprobs[0].logprob == pytest.approx(float(logp[completion.ids[0]]), abs=0.1)
    model.soft_prefix = None
    with torch.no_grad():
        bare = model(torch.tensor([[7, 8, 9]]))[0, -1].log_softmax(-1)
    assert abs(float(bare[completion.ids[0]] - logp[completion.ids[0]])) > 0.3  # another prompt would be seen


def test_bits_per_byte(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Packed rows: each document as if alone behind the prompt."""
    model, texts = prompted(model, 6), ["The cat sat.", "小猫坐在垫子上，看着月亮。", "the mat", "a"]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
        with torch.no_grad():
            nats -= float(model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
    (result,) = measure_files(model, tokenizer, [file])
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-5)


def test_rows_leave_room_for_the_prompt(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Text longer than the context of 256 is read in rows of 250."""
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "The cat sat on the mat. 小猫 " * 60}) + "\n", encoding="utf-8")
    model = prompted(model, 6)
    widest, rows_of_250, shorter = (measure_files(model, tokenizer, [file], n)[0] for n in (None, 250, 200))
    assert widest == rows_of_250 != shorter


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_greedy_answers_are_those_of_peft(tokenizer: Tokenizer, tmp_path: Path, method: str) -> None:
    peft = pytest.importorskip("peft", reason="the reference of every soft prompt")
    transformers = pytest.importorskip("transformers", reason="the model below PEFT")
    from safetensors.torch import load_file

    from groundup.adapt.soft import load_soft

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    stock = transformers.LlamaForCausalLM(config).eval()
    for parameter in stock.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    stock.save_pretrained(tmp_path / "base")
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 7}
    soft = peft.PromptTuningConfig(**common) if method == "prompt" else peft.PrefixTuningConfig(**common)
    theirs = peft.get_peft_model(stock, soft).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ours = load_model(tmp_path / "base")
    load_soft(ours, settings, load_file(tmp_path / "adapter" / "adapter_model.safetensors")).merge()
    prompts = many_prompts(tokenizer.vocab_size, 6, seed=8)
    requests = run(Engine(ours, tokenizer, TIGHT), prompts, [SamplingParams(max_tokens=20, ignore_eos=True)] * 6)
    for prompt, request in zip(prompts, requests, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20,
                              do_sample=False, eos_token_id=None)[0].tolist()  # fmt: skip
        assert request.completions()[0].ids == out[-20:]
