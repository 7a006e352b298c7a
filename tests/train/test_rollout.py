"""The engine answers with the very weights that are being trained, and a rollout depends on them and numbers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from groundup.adapt.build import adapt
from groundup.config import AdaptConfig, RLConfig
from groundup.data.rows import Message, Prompt
from groundup.errors import UserError
from groundup.infer.params import Completion, SamplingParams
from groundup.infer.sampler import SamplingState, _choose, sample
from groundup.model.config import ModelConfig
from groundup.model.scored import begin_scored
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.train.experience import Experience, pack_rows, split_rows, unpack_column
from groundup.train.onpolicy import can_fork
from groundup.train.reference import token_logps, without_dropout
from groundup.train.rollout import Answer, Sampler

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def tokenizer(ground: Path) -> Tokenizer:
    return load_tokenizer(ground / "tok")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    asked = ("the cat", "a red dog", "小猫", "run far from home and sat on a mat", "one")
    return [Prompt([{"role": "user", "content": text}]) for text in asked]


def native(tokenizer: Tokenizer, **changes: Any) -> Transformer:
    shape: dict[str, Any] = {"max_position_embeddings": 256, **changes}
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 2, 1, 32, **shape))
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    return model


def foreign(tokenizer: Tokenizer) -> Any:
    """GPT-J, whose head has a bias, so that the engine's head is no parameter."""
    import transformers

    from groundup.model.foreign import Foreign
    from groundup.model.foreign_config import ForeignConfig

    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=tokenizer.vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4,
        bos_token_id=1, eos_token_id=tokenizer.eos_id, resid_pdrop=0.1,
    )  # fmt: skip
    inner = transformers.GPTJForCausalLM(config)
    inner.lm_head.bias.data.normal_()
    return inner, Foreign, ForeignConfig


def tuned(tokenizer: Tokenizer, tied: bool = True, **settings: Any) -> nn.Module:
    model = native(tokenizer, tie_word_embeddings=tied)
    adapted = adapt(model, AdaptConfig(**settings), 0, tokenizer)
    assert adapted is not None
    return adapted.forward_model()


def policies(tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    def stock() -> Any:
        from groundup.model.io import load_model

        inner, _, _ = foreign(tokenizer)
        inner.save_pretrained(tmp_path / "gptj")
        return load_model(tmp_path / "gptj")

    return {
        "fused": lambda: native(tokenizer),
        "untied": lambda: native(tokenizer, tie_word_embeddings=False),
        "lora": lambda: tuned(tokenizer, method="lora", rank=4),
        "head": lambda: tuned(tokenizer, False, method="lora", rank=4, target=["q_proj", "lm_head"]),
        "prefix": lambda: tuned(tokenizer, method="p_tuning_v2", tokens=3),
        "foreign": stock,
    }


def settings(**changes: Any) -> RLConfig:
    return RLConfig(**{"group_size": 3, "max_tokens": 12, "temperature": TEMPERATURE, **changes})


def experiences_of(answers: list[Answer]) -> list[Experience]:
    return [
        Experience(a.prompt, a.prompt_ids + a.ids, len(a.prompt_ids), a.truncated, 0.0,
                   {"mask": torch.tensor(a.mask).float()})
        for a in answers
    ]  # fmt: skip


def trainer_logprobs(model: nn.Module, answers: list[Answer], tokenizer: Tokenizer) -> list[list[float]]:
    experiences = experiences_of(answers)
    batch, places = pack_rows(experiences, 128, tokenizer.pad_id)
    with torch.no_grad():
        found_BT = token_logps(model, batch, TEMPERATURE)  # type: ignore[arg-type]
    pairs = zip(experiences, places, strict=True)
    return [found_BT[p.row, p.begin : p.begin + e.length].tolist() for e, p in pairs]


@pytest.mark.parametrize("name", ["fused", "untied", "lora", "prefix"])
@pytest.mark.parametrize("seq_len", [50, 128])
def test_answers_that_share_a_copy_of_their_prompt_are_learnt_from_alike(
    name: str, seq_len: int, tokenizer: Tokenizer, prompts: list[Prompt], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    model = without_dropout(policies(tokenizer, tmp_path)[name]())
    assert can_fork(model)
    experiences = experiences_of(Sampler(model, tokenizer, settings(), seed=5).sample(prompts, 0))
    generator = torch.Generator().manual_seed(0)
    for one in experiences:
        one.columns["advantages"] = torch.randn(one.length, generator=generator)
    found, slopes, positions = [], [], []
    for fork in (False, True):
        batch, spots = pack_rows(experiences, seq_len, tokenizer.pad_id, fork=fork)
        logps_BT = token_logps(model, batch, TEMPERATURE)
        model.zero_grad()
        (logps_BT * batch.advantages_BT).sum().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        each = zip(experiences, spots, strict=True)
        found.append(torch.cat([logps_BT[s.row, s.begin : s.begin + e.length].detach() for e, s in each]))
        positions.append(int((batch.doc_ids_BT >= 0).sum()))
        assert batch.input_ids_BT.shape[1] <= seq_len
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-4, rtol=1e-3)
    assert positions[1] < 0.9 * positions[0]


def test_transformers_attention_is_given_whole_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    foreign = policies(tokenizer, tmp_path)["foreign"]()
    assert not can_fork(foreign) and not can_fork(begin_scored(foreign, 0).trunk)


def test_a_prompt_of_one_token_is_nothing_to_share() -> None:
    answers = [Experience(0, [7, *ids], 1, False, 0.0, {"mask": torch.ones(len(ids))}) for ids in ([1, 2], [3, 4], [5])]
    [plain, _], [shared, _] = (pack_rows(answers, 64, 0, fork=fork) for fork in (False, True))
    assert torch.equal(shared.doc_ids_BT, plain.doc_ids_BT) and torch.equal(shared.input_ids_BT, plain.input_ids_BT)


@pytest.mark.parametrize(
    ("rows", "device", "widths"),
    [(1, "cpu", [256, 176, 112]), (2, "cpu", [256, 112]), (1, "cuda", [256, 256, 128])],
)
def test_a_micro_batch_is_as_wide_as_the_answers_in_it(rows: int, device: str, widths: list[int]) -> None:
    """Figures measured a micro-batch at a time go back to their answers, whatever its width."""
    answers = [
        Experience(i, [9, *range(n)], 1, False, columns={"mask": torch.ones(n)}) for i, n in enumerate((170, 100, 250))
    ]
    batch, spots = pack_rows(answers, 256, 0)
    parts = list(split_rows(batch, rows, torch.device(device)))
    assert [part.input_ids_BT.shape[1] for part in parts] == widths
    assert all(part.labels_BT.is_contiguous() for part in parts)
    unpack_column([row for part in parts for row in part.labels_BT], answers, spots, "found")
    assert [one.columns["found"].tolist() for one in answers] == [one.ids[1:] for one in answers]


def furthest(answers: list[Answer], trainer: list[list[float]]) -> float:
    pairs = [pair for a, own in zip(answers, trainer, strict=True) for pair in zip(a.logprobs, own, strict=True)]
    return max(abs(x - y) for x, y in pairs)


@pytest.mark.parametrize("name", ["fused", "untied", "lora", "head", "prefix", "foreign"])
def test_after_an_optimizer_step_the_engine_answers_with_the_new_weights(
    name: str, tokenizer: Tokenizer, prompts: list[Prompt], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    model = without_dropout(policies(tokenizer, tmp_path)[name]())
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=0.05)
    sampler = Sampler(model, tokenizer, settings(), seed=5)
    first = sampler.sample(prompts, 0)
    assert furthest(first, trainer_logprobs(model, first, tokenizer)) < 2e-4
    ids = torch.tensor([first[0].prompt_ids + first[0].ids])
    for _ in range(2):  # LoRA's second matrix starts at zero: the first step moves no other
        (-model.hidden(ids).square().mean() - (model(ids).log_softmax(-1)[..., 5]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    second = sampler.sample(prompts, 0)
    assert furthest(second, trainer_logprobs(model, second, tokenizer)) < 2e-4
    old = trainer_logprobs(model, first, tokenizer)
    assert furthest(first, old) > 1e-2, "the step moved nothing that can be seen"
    assert [a.ids for a in first] != [a.ids for a in second]
    fresh = Sampler(copy.deepcopy(model), tokenizer, settings(), seed=5).sample(prompts, 0)
    assert [a.ids for a in fresh] == [a.ids for a in second], "something of the old weights was kept"


def test_the_engine_reads_the_parameters_where_they_are(tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    model = native(tokenizer)
    sampler = Sampler(model, tokenizer, settings(), seed=5)
    sampler.sample(prompts[:1], 0)
    fused = sampler.engine().runner._fused
    assert fused is not None, "no C compiler here"
    for block, joined in zip(model.blocks, fused.blocks, strict=True):
        attention: Any = block.self_attn
        parts = (attention.q_proj.weight, attention.v_proj.weight)
        assert joined.qkv.weight is not None
        assert {p.untyped_storage().data_ptr() for p in parts} == {joined.qkv.weight.untyped_storage().data_ptr()}


def test_an_answer_depends_on_weights_seed_round_and_number_alone(tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    sampler = Sampler(native(tokenizer), tokenizer, settings(max_sequences=4), seed=5)
    whole = sampler.sample(prompts, 2)
    parts = sampler.sample([prompts[3], prompts[1]], 2, numbers=[3, 1])
    texts = {number: [a.ids for a in whole if a.prompt == number] for number in range(5)}
    assert [a.ids for a in parts] == texts[3] + texts[1]
    assert [a.logprobs for a in parts[:3]] == [a.logprobs for a in whole if a.prompt == 3]
    assert len({tuple(a.ids) for a in whole}) > 10, "answers to one prompt are alike"
    assert [a.ids for a in sampler.sample(prompts, 3)] != [a.ids for a in whole]
    other = Sampler(native(tokenizer), tokenizer, settings(), seed=6)
    assert [a.ids for a in other.sample(prompts, 2)] != [a.ids for a in whole]


def test_an_answer_is_told_with_its_stop_token_and_its_end(tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    model = native(tokenizer)
    sampler = Sampler(model, tokenizer, settings(group_size=40, temperature=3.0, max_tokens=8), seed=1)
    answers = sampler.sample(prompts, 0)
    ended = [a for a in answers if not a.truncated]
    assert ended and len(ended) < len(answers)
    assert all(a.ids[-1] in tokenizer.stop_ids for a in ended)
    assert all(len(a.ids) == 8 and a.ids[-1] not in tokenizer.stop_ids for a in answers if a.truncated)
    for a in answers:
        assert len(a.ids) == len(a.logprobs) == len(a.mask) and set(a.mask) == {1}
        said = a.ids if a.truncated else a.ids[:-1]
        assert a.text == tokenizer.decode(said) or "�" in a.text  # bytes that are no UTF-8 may be told apart otherwise


def test_greedy_answers_are_the_engines_own(tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    from groundup.infer.generate import generate

    model = native(tokenizer)
    sampler = Sampler(model, tokenizer, settings(), seed=5)
    answers = sampler.sample(prompts, 0, n=1, temperature=0.0)
    plain = generate(model, tokenizer, [sampler.render(p) for p in prompts], SamplingParams(max_tokens=12))
    assert [a.ids for a in answers] == [c.ids for c in plain]


def test_weights_that_are_no_numbers_are_said_so(tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    model = native(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="the policy cannot be sampled"):
        Sampler(model, tokenizer, settings(), seed=5).sample(prompts, 0)


def test_a_thought_that_the_prompt_opened_belongs_to_the_text(tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    model = native(tokenizer)
    opened = Sampler(model, tokenizer, settings(enable_thinking=True), seed=5).sample(prompts[:1], 0)
    closed = Sampler(model, tokenizer, settings(enable_thinking=False), seed=5).sample(prompts[:1], 0)
    assert all(a.text.startswith("<think>\n") for a in opened)
    assert not any(a.text.startswith("<think>") for a in closed)


class Calculator:
    """Answers every turn twice with a tool's result, whatever was said."""

    def reply(self, prompt: Prompt, messages: list[Message], text: str) -> tuple[Message, list[Message]] | None:
        if sum(message["role"] == "tool" for message in messages) == 2:
            return None
        return {"role": "assistant", "content": text}, [{"role": "tool", "content": "42 is it"}]


class Scripted(Sampler):
    """Says what it is told to, and the stop token."""

    lines = ("the cat", "sat on a mat", "home")

    def _ask(self, asked: Any) -> list[Completion]:
        answers = []
        for ids, params in asked:
            turn = sum(ids[i : i + len(self.result)] == self.result for i in range(len(ids)))
            said = [*self.tokenizer.encode(self.lines[turn]), self.end]
            answers += [Completion(list(ids), said, self.lines[turn], "stop", None, i) for i in range(params.n)]
        return answers


def test_what_a_tool_answers_is_read_and_not_learnt(tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    sampler = Scripted(native(tokenizer), tokenizer, settings(max_tokens=200), 0, environment=Calculator(), turns=5)
    sampler.result = tokenizer.encode("42 is it")  # type: ignore[attr-defined]
    sampler.end = tokenizer.plain.control["<|im_end|>"]  # type: ignore[attr-defined]
    answer = sampler.sample(prompts[:1], 0, n=1)[0]
    talk: list[Message] = list(prompts[0].messages)
    for i, line in enumerate(Scripted.lines):
        talk.append({"role": "assistant", "content": line})
        if i < 2:
            talk.append({"role": "tool", "content": "42 is it"})
    shown = tokenizer.render(talk)
    whole = answer.prompt_ids + answer.ids
    assert whole == shown.ids[: len(whole)] and tokenizer.decode(shown.ids[len(whole) :]).strip() == ""
    assert [0] * len(answer.prompt_ids) + answer.mask == shown.mask[: len(whole)]
    assert answer.text == "the cat\nsat on a mat\nhome" and not answer.truncated
    short = Scripted(native(tokenizer), tokenizer, settings(max_tokens=14), 0, environment=Calculator(), turns=5)
    short.result, short.end = sampler.result, sampler.end  # type: ignore[attr-defined]
    cut = short.sample(prompts[:1], 0, n=1)[0]
    assert cut.truncated and set(cut.mask) == {1}, "there was no room to hear the tool and to go on"


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_drawing_together_is_drawing_one_by_one(mode: Any) -> None:
    """The rollout's shortcut through a whole batch gives the bits of the row by row path."""
    logits_BV = torch.randn(37, 1003, generator=torch.Generator().manual_seed(0)) * 4
    temperatures = [0.3, 0.7, 1.0, 1.3]

    def states() -> list[SamplingState]:
        return [
            SamplingState(
                SamplingParams(temperature=temperatures[i % 4], seed=i, logprobs=0, logprobs_mode=mode), [1], 1003
            )
            for i in range(37)
        ]

    assert all(state.free for state in states())
    together, logprobs = sample(logits_BV, states())
    alone = [_choose(row, state) for row, state in zip(logits_BV, states(), strict=True)]
    assert together == [int(token) for token, _ in alone]
    for row, (token, told) in enumerate(zip(together, logprobs, strict=True)):
        scale = temperatures[row % 4] if mode == "processed_logprobs" else 1.0
        assert told is not None
        assert told.logprob == pytest.approx(float((logits_BV[row] / scale).log_softmax(-1)[token]), abs=1e-5)
        if mode == "processed_logprobs":
            assert told.logprob == alone[row][1]


def test_processed_logprobs_are_those_of_the_cut_distribution() -> None:
    logits_BV = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    params = SamplingParams(temperature=0.5, top_k=2, seed=1, logprobs=0, logprobs_mode="processed_logprobs")
    ids, logprobs = sample(logits_BV, [SamplingState(params, [0], 4)])
    wanted = (logits_BV[0, :2] / 0.5).log_softmax(-1)
    assert logprobs[0] is not None and ids[0] in (0, 1)
    assert logprobs[0].logprob == pytest.approx(float(wanted[ids[0]]), abs=1e-6)
