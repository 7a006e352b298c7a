"""Models of transformers under the engine: under load they answer what transformers' generate answers to each alone."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from foreign_models import VOCAB, save_stock
from transformers import AutoModelForCausalLM

from groundup.errors import UserError
from groundup.infer.engine import Engine, EngineSettings, Request
from groundup.infer.foreign import windowed_attention
from groundup.infer.params import SamplingParams
from groundup.infer.speculate import ModelDrafter
from groundup.model.foreign import Foreign
from groundup.model.io import load_model
from groundup.ops.paged import paged_attention
from groundup.tokenizer import Tokenizer, train_tokenizer

TIGHT = EngineSettings(block_size=4, num_blocks=36, max_batch_tokens=16, max_sequences=8)
SERVED = ["opt", "opt-350m", "gpt2", "gpt_neox", "gemma", "gemma3", "phi", "qwen3_moe", "mixtral", "mistral", "cohere",
          "deepseek_v3"]  # fmt: skip
RECOMPUTED = ["bloom", "gptj", "mamba"]
NEW = 14


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(["a b"], 300)


def load(name: str, folder: Path) -> tuple[Foreign, torch.nn.Module]:
    save_stock(name, folder)
    model = load_model(folder)
    assert isinstance(model, Foreign)
    return model, AutoModelForCausalLM.from_pretrained(folder).eval()


def prompts_of(number: int) -> list[list[int]]:
    """1 to 40 tokens; every other begins as the one before."""
    random, found = Random(0), []
    for i in range(number):
        shared = found[-1][: random.randrange(len(found[-1]))] if i % 2 else []
        found.append(shared + [random.randrange(3, VOCAB) for _ in range(random.randrange(1, 41 - len(shared)))])
    return found


def generated(theirs: torch.nn.Module, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def run(engine: Engine, prompts: list[list[int]], new: int = NEW) -> list[Request]:
    """The requests come in between the steps, one or two at a time."""
    random, waiting, requests = Random(1), list(prompts), []
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    while waiting or engine.has_work:
        for _ in range(random.randrange(3)):
            if waiting:
                requests.append(engine.add(waiting.pop(0), params))
        engine.step()
    return requests


@pytest.mark.parametrize("name", SERVED)
def test_greedy_under_load(name: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prompts read in pieces, beginnings shared, sequences preempted: the tokens are transformers'."""
    model, theirs = load(name, tmp_path)
    engine = Engine(model, small_tokenizer, TIGHT)
    prompts = prompts_of(12)
    for request, prompt in zip(run(engine, prompts), prompts, strict=True):
        assert request.completions()[0].ids == generated(theirs, prompt)
    stats = engine.stats()
    assert stats["cached_tokens"] > 0 and stats["preemptions"] > 0
    assert engine.blocks.used == 0


@pytest.mark.parametrize("name", RECOMPUTED)
def test_greedy_without_a_cache(name: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What no cache can hold is computed from its beginning each time: slow, and the same."""
    model, theirs = load(name, tmp_path)
    engine = Engine(model, small_tokenizer, TIGHT)
    assert engine.runner.cache.keys.numel() == 0
    prompts = prompts_of(6)
    for request, prompt in zip(run(engine, prompts, 6), prompts, strict=True):
        assert request.completions()[0].ids == generated(theirs, prompt, 6)


def test_several_answers_prompt_logprobs_and_embeddings(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of a model whose head has a bias: none of its extra inputs gets out."""
    model, theirs = load("phi", tmp_path)
    engine = Engine(model, small_tokenizer, TIGHT)
    prompt = prompts_of(3)[2]
    request = engine.add(prompt, SamplingParams(max_tokens=3, n=3, temperature=1.0, seed=0, prompt_logprobs=0))
    while engine.has_work:
        engine.step()
    with torch.no_grad():
        out = theirs(torch.tensor([prompt]), output_hidden_states=True)
    logprobs = out.logits[0].log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
    assert torch.allclose(torch.tensor([p.logprob for p in request.prompt_logprobs]), logprobs, atol=1e-4)
    assert len({tuple(completion.ids) for completion in request.completions()}) > 1
    (embedding,) = engine.embed([prompt])
    mean = theirs.model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
    assert torch.allclose(embedding, mean / mean.norm(), atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_matrices_answer_nearly_the_same(scheme: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, theirs = load("gpt_neox", tmp_path)
    engine = Engine(model, small_tokenizer, EngineSettings(block_size=4, num_blocks=40, quantize=scheme))
    prompt = prompts_of(5)[4]
    request = engine.add(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True))
    while engine.has_work:
        engine.step()
    with torch.no_grad():
        logprobs = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
    found = torch.tensor([p.logprob for p in request.prompt_logprobs])
    error = float((found - logprobs).abs().mean())
    assert 0 < error < {"int8": 0.05, "int4": 0.6}[scheme]


def test_what_cannot_be_quantised_is_said(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = EngineSettings(num_blocks=4, quantize="int8")
    with pytest.raises(UserError, match="gpt2 has no matrices of the kind that can be kept in int8"):
        Engine(load("gpt2", tmp_path / "gpt2")[0], small_tokenizer, settings)
    with pytest.warns(UserWarning, match=r"\d\d% of mixtral's blocks can be kept in int8, the rest stays"):
        Engine(load("mixtral", tmp_path / "mixtral")[0], small_tokenizer, settings)


def test_one_drafts_for_another(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, theirs = load("opt", tmp_path / "opt")
    drafter = ModelDrafter(load("gpt2", tmp_path / "gpt2")[0], tokens=3)
    engine = Engine(model, small_tokenizer, EngineSettings(block_size=4, num_blocks=80), drafter)
    prompts = prompts_of(4)
    for request, prompt in zip(run(engine, prompts), prompts, strict=True):
        assert request.completions()[0].ids == generated(theirs, prompt)
    assert engine.stats()["drafted"] > 0


@pytest.mark.parametrize("window", [1, 3, 5, 64])
def test_windows_over_pages(window: int) -> None:
    """Against whole attention with a mask, blocks in any order and rubbish where nobody has written."""
    torch.manual_seed(0)
    size, kv_heads, heads, dim = 4, 2, 4, 8
    keys, values = (torch.full((12, kv_heads, size, dim), torch.nan) for _ in range(2))
    tables, pieces = torch.tensor([[7, 2, 9], [4, 1, 0]], dtype=torch.int32), [(6, 5), (3, 1)]
    queries, expected = [], []
    for row, (first, count) in enumerate(pieces):
        total = first + count
        k, v = torch.randn(2, total, kv_heads, dim)
        for at in range(total):
            keys[tables[row, at // size], :, at % size], values[tables[row, at // size], :, at % size] = k[at], v[at]
        q = torch.randn(count, heads, dim)
        back = torch.arange(first, total)[:, None] - torch.arange(total)
        scores = torch.einsum("thd,lhd->htl", q, k.repeat_interleave(2, 1)) * dim**-0.5
        scores = scores.masked_fill((back < 0) | (back >= window), -torch.inf)
        queries.append(q)
        expected.append(torch.einsum("htl,lhd->thd", scores.softmax(-1), v.repeat_interleave(2, 1)))
    q, wanted = torch.cat(queries), torch.cat(expected)
    assert torch.allclose(windowed_attention(q, keys, values, tables, pieces, window), wanted, atol=1e-5)
    if window == 64:
        sequence = torch.tensor([0] * 5 + [1], dtype=torch.int32)
        lengths = torch.tensor([*range(7, 12), 4], dtype=torch.int32)
        assert torch.allclose(paged_attention(q, keys, values, tables, sequence, lengths, pieces), wanted, atol=1e-5)
