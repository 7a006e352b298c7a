"""Many requests, one model: equal to transformers, and none changes another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from groundup.errors import UserError
from groundup.infer.engine import Engine
from groundup.infer.generate import generate, stream
from groundup.infer.params import SamplingParams
from groundup.infer.runner import Runner
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer

Prompts = list[list[int]]


def test_greedy_equals_transformers(model: Transformer, tokenizer: Tokenizer, prompts: Prompts, tmp_path: Path) -> None:
    """Token for token, up to the stop token or the length, prompts of all lengths in one batch."""
    from transformers import AutoModelForCausalLM

    save_model(model, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = generate(model, tokenizer, prompts, SamplingParams(max_tokens=30))
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = stock.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30,
            eos_token_id=tokenizer.stop_ids, pad_token_id=0,
        )  # fmt: skip
        assert completion.ids == theirs[0, len(prompt) :].tolist()
        assert completion.prompt_ids == prompt


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=25),
        SamplingParams(max_tokens=25, temperature=1.0, top_p=0.95, seed=5),
        SamplingParams(max_tokens=25, repetition_penalty=1.5),
    ],
)
def test_no_request_changes_another(
    model: Transformer, tokenizer: Tokenizer, prompts: Prompts, params: SamplingParams
) -> None:
    together = generate(model, tokenizer, prompts, params)
    assert together == [generate(model, tokenizer, [prompt], params)[0] for prompt in prompts]
    assert together[::-1] == generate(model, tokenizer, prompts[::-1], params)


def test_rows_that_end_early_leave_the_others_alone(model: Transformer, tokenizer: Tokenizer, prompts: Prompts) -> None:
    """Each request has its own length: rows leave the batch in turn, and the cache grows for the last."""
    each = [SamplingParams(max_tokens=1 + 11 * i, ignore_eos=True) for i in range(len(prompts))]
    together = generate(model, tokenizer, prompts, each)
    assert [len(c.ids) for c in together] == [p.max_tokens for p in each]
    alone = [generate(model, tokenizer, [prompt], one)[0] for prompt, one in zip(prompts, each, strict=True)]
    assert together == alone


def test_finished_rows_are_not_computed(model, tokenizer, prompts, monkeypatch) -> None:
    widths = []
    hidden = Runner.hidden
    monkeypatch.setattr(Runner, "hidden", lambda run, work: widths.append(sum(map(len, work))) or hidden(run, work))
    each = [SamplingParams(max_tokens=2 if i else 20, ignore_eos=True) for i in range(len(prompts))]
    generate(model, tokenizer, prompts, each)
    assert widths == [sum(map(len, prompts)), len(prompts), *[1] * 18]


def test_stop_token_ends_the_row(model: Transformer, tokenizer: Tokenizer, prompts: Prompts) -> None:
    """The token that ended it stands in ids and not in text."""
    free = generate(model, tokenizer, prompts[:1], SamplingParams(max_tokens=12, ignore_eos=True))[0]
    end = free.ids[5]
    at = free.ids.index(end)
    ended = generate(model, _Stops(tokenizer, [end]), prompts[:1], SamplingParams(max_tokens=12))[0]
    assert ended.ids == free.ids[: at + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == tokenizer.decode(free.ids[:at])
    assert (free.finish_reason, len(free.ids)) == ("length", 12)


class _Stops:
    """The tokenizer with other stop tokens."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: list[int]) -> None:
        self.stop_ids, self._tokenizer = stop_ids, tokenizer

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)


def test_seeds(model: Transformer, tokenizer: Tokenizer, prompts: Prompts) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=1)
    one, same = generate(model, tokenizer, [prompts[0]] * 2, params)
    other = generate(model, tokenizer, [prompts[0]], replace(params, seed=2))[0]
    assert one == same
    assert other != one
    free = generate(model, tokenizer, [prompts[0]] * 2, replace(params, seed=None))
    assert free[0] != free[1]


def test_the_global_random_state_is_left_alone(model, tokenizer, prompts) -> None:
    before = torch.get_rng_state()
    generate(model, tokenizer, prompts, SamplingParams(max_tokens=3, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_context_bounds_an_answer(model: Transformer, tokenizer: Tokenizer) -> None:
    context = model.config.max_position_embeddings
    long = [7] * (context - 3)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    short, cut = generate(model, tokenizer, [[7], long], params)
    assert (len(short.ids), len(cut.ids), cut.finish_reason) == (50, 3, "length")
    with pytest.raises(UserError, match=f"prompt 2: {context} tokens leave no room"):
        generate(model, tokenizer, [[7], [7] * context], params)
    with pytest.raises(UserError, match="prompt 1: is empty"):
        generate(model, tokenizer, [[]], params)


def test_text_prompts_start_a_document(model: Transformer, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=5)
    ids = [tokenizer.bos_id, *tokenizer.encode("The cat")]
    assert generate(model, tokenizer, ["The cat"], params) == generate(model, tokenizer, [ids], params)


def test_a_stream_joins_to_the_whole(model: Transformer, tokenizer: Tokenizer, prompts: Prompts) -> None:
    for prompt in prompts:
        params = SamplingParams(max_tokens=40, temperature=1.2, seed=3)
        whole = generate(model, tokenizer, [prompt], params)[0]
        pieces = stream(Engine(model, tokenizer), prompt, params)
        assert pieces.completion is None
        parts = list(pieces)
        assert "".join(parts) == whole.text
        assert pieces.completion == whole
        assert all(parts)
        assert "\ufffd" not in "".join(parts) or "\ufffd" in tokenizer.decode(whole.ids)


def test_a_stream_comes_piece_by_piece(model, tokenizer, prompts, monkeypatch) -> None:
    """The first piece is there before the last token is computed."""
    calls = []
    hidden = Runner.hidden
    monkeypatch.setattr(Runner, "hidden", lambda run, work: calls.append(1) or hidden(run, work))
    pieces = stream(Engine(model, tokenizer), prompts[0], SamplingParams(max_tokens=60, ignore_eos=True))
    next(pieces)
    assert 0 < len(calls) < 10


def test_stop_strings(model: Transformer, tokenizer: Tokenizer, prompts: Prompts) -> None:
    """The answer ends before the first stop string, in the batch and in the stream alike."""
    whole = generate(model, tokenizer, prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    for prompt, free in zip(prompts, whole, strict=True):
        stop = (free.text[9:12], free.text[14:18])
        params = SamplingParams(max_tokens=40, ignore_eos=True, stop=stop)
        wanted = min(free.text.find(s) for s in stop)
        got = generate(model, tokenizer, [prompt], params)[0]
        assert (got.text, got.finish_reason) == (free.text[:wanted], "stop")
        assert "".join(stream(Engine(model, tokenizer), prompt, params)) == got.text
        assert len(got.ids) < 40
