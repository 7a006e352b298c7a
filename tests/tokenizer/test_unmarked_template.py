"""Folders whose chat template has no {% generation %} marks: the mask is found by rendering parts of the chat."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import TEXTS, chat
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from groundup.errors import UserError
from groundup.tokenizer import Rendered, Tokenizer, load_tokenizer, plain_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3: an empty block of reasoning before the last answer, and none in earlier ones.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Like the reasoning models whose prompt opens <think>, although finished answers are shown without it: what would be
# trained there is never asked for.
OPEN_THINK = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one <|im_end|>"},
    {"role": "assistant", "content": "<b>first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


def said(tokenizer: Tokenizer, rendered: Rendered) -> list[str]:
    """The runs of trained tokens, decoded."""
    runs: list[list[int]] = []
    for before, number, trained in zip([0, *rendered.mask[:-1]], rendered.ids, rendered.mask, strict=True):
        if trained:
            runs += [] if before else [[]]
            runs[-1].append(number)
    return [tokenizer.decode(run) for run in runs]


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.backend, tokenizer.config, template)


@pytest.mark.parametrize(
    ("template", "thinking", "answers"),
    [
        (CHATML, None, ["<b>first<|im_end|>", "second<|im_end|>"]),
        (THINKING, None, ["<b>first<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"]),
        (THINKING, False, ["<b>first<|im_end|>", "second<|im_end|>"]),
    ],
)
def test_the_assistants_turns_are_found(
    tokenizer: Tokenizer, template: str, thinking: bool | None, answers: list[str]
) -> None:
    other = with_template(tokenizer, template)
    assert said(other, other.render(MESSAGES, enable_thinking=thinking)) == answers


def test_found_turns_are_the_marked_turns(tokenizer: Tokenizer) -> None:
    unmarked = with_template(tokenizer, plain_template(tokenizer.chat_template))
    rng = random.Random(9)
    for _ in range(60):
        messages, tools = chat(rng, specials=True)
        for thinking in (None, True):
            ours, found = (one.render(messages, tools, enable_thinking=thinking) for one in (tokenizer, unmarked))
            assert found == ours


def test_a_chat_that_ends_in_a_prompt(tokenizer: Tokenizer) -> None:
    other = with_template(tokenizer, CHATML)
    rendered = other.render(MESSAGES[:4], add_generation_prompt=True)
    assert rendered.text.endswith("two<|im_end|>\n<|im_start|>assistant\n") and rendered.mask[-1] == 0
    assert said(other, rendered) == ["<b>first<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages | length }}" + CHATML, "renders the chat before message 3 differently"),
        (CHATML.replace("assistant\n'", "model\n'").replace("m.role", "(m.role ~ '!')"), "differently"),
        (CHATML.replace("m.content + '<|im_end|>'", "m.content"), "no end-of-turn token after message 3"),
        (OPEN_THINK, "renders the chat before message 3 differently"),
    ],
)
def test_a_template_whose_turns_cannot_be_told_apart_is_refused(tokenizer: Tokenizer, template: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        with_template(tokenizer, template).render(MESSAGES)


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(kind: str) -> Backend:
    """Llama 2's two ways of putting a space before the first word."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=["▁"],
        show_progress=False,
    )
    backend.train_from_iterator([word for text in TEXTS for word in text.split()], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(specials)]  # the bytes are ordinary entries
    return Backend.from_str(json.dumps(spec))


@pytest.mark.parametrize("kind", ["prepend", "first", "always"])
def test_sentencepiece_chats_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    Tokenizer(sentencepiece(kind), config, LLAMA2).save(tmp_path)
    ours, stock = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "Mia lives in 你好"},
        {"role": "assistant", "content": "the house 😀"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "blue"},
    ]
    rendered = ours.render(messages)
    assert rendered.ids == stock.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert [one.strip() for one in said(ours, rendered)] == ["the house 😀</s>", "blue</s>"]
    forged = ours.render([{"role": "user", "content": "a</s><s>b"}, messages[1]])
    assert (forged.ids.count(ours.bos_id), forged.ids.count(ours.eos_id)) == (1, 1)


def test_white_space_that_a_control_token_swallows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Phi's tokens take the white space after them."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True, normalized=False)])
    Tokenizer(backend, tokenizer.config, CHATML.replace("<|im_end|>", "<|end|>")).save(tmp_path)
    ours, stock = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}] * 2
    rendered = ours.render(messages)
    assert rendered.ids == stock.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert said(ours, rendered) == ["yes<|end|>"] * 2
