"""A stock llama.cpp loads what we wrote and says what we say: greedy tokens, ids of text, and prompts of chats."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from export_models import FAMILIES, greedy, make_model
from llama_cpp import LlamaCpp
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from groundup.export.pretokenizer import KNOWN, PreTokenizer, spell_out
from groundup.export.run import export
from groundup.model.io import load_model
from groundup.tokenizer import Tokenizer

pytest.importorskip("xllamacpp", reason="no llama.cpp here: pip install xllamacpp")
TEXTS = [
    "The blue house by the river, doesn't it? DON'T!",
    "小明住在河边。他有3只猫和12只鸡！",
    "def add(a, b):\n    return a + b\n\n\n\tx = 3.14159\n",
    "   runs  of    spaces \t\t and\n\n\n lines  ",
    "1234567890 1,000.5 x²",
    "<|im_end|> typed by a user <think>",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logprobs_are_ours(tokenizer: Tokenizer, tmp_path: Path, family: str) -> None:
    folder = make_model(tokenizer, tmp_path / "model", spare_rows=3, **FAMILIES[family])
    export(folder, "gguf", "f32", tmp_path / "model.gguf")
    server = LlamaCpp(tmp_path / "model.gguf")
    for text in TEXTS[:2]:
        prompt = [tokenizer.bos_id, *tokenizer.encode(text * 3)]
        # llama.cpp, told to ignore ends, never draws one.
        ends = [tokenizer.eos_id, tokenizer.pad_id]
        assert server.greedy(prompt, 32, ignore_eos=True) == greedy(folder, prompt, 32, never=ends)
    compared = 0
    model, long = load_model(folder), [tokenizer.bos_id, *tokenizer.encode(" ".join(TEXTS) * 3)]
    for length in (1, 2, 3, 8, 9, 30, 31, 32, 200, 201, 400, 401):
        with torch.no_grad():
            logprobs_V = model(torch.tensor([long[:length]]))[0, -1].log_softmax(-1)
        found = {i: p for i, p in server.next_logprobs(long[:length]).items() if p > -100}  # eos is told to be none
        assert all(abs(p - logprobs_V[i].item()) < 1e-3 for i, p in found.items()), length
        compared += len(found)
    assert compared > 50


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export(model_dir, "gguf", "f32", path)
    return LlamaCpp(path)


def test_ids_of_text_are_ours(server: LlamaCpp, tokenizer: Tokenizer) -> None:
    for text in TEXTS[:-1]:
        assert server.tokenize(text) == tokenizer.encode(text), text


def test_control_tokens_of_a_prompt_are_parsed(server: LlamaCpp, tokenizer: Tokenizer) -> None:
    rendered = tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True, enable_thinking=True)
    assert server.tokenize(rendered.text, special=True) == rendered.ids


def test_prompts_of_chats_are_ours(server: LlamaCpp, tokenizer: Tokenizer) -> None:
    chat = [{"role": "system", "content": "Be Ada."}, {"role": "user", "content": "1+1?"}]

    def ours(**options: bool) -> str:
        return tokenizer.render(chat, add_generation_prompt=True, **options).text

    assert server.prompt(chat) == ours(), "a client that says nothing"
    assert server.prompt(chat, chat_template_kwargs={"enable_thinking": False}) == ours(enable_thinking=False)
    assert server.prompt(chat, chat_template_kwargs={"thinking": True}) == ours(enable_thinking=True)


def test_tools_and_calls_are_rendered_as_ours(server: LlamaCpp, tokenizer: Tokenizer) -> None:
    function = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 1, "b": [2, 3]}'}}
    chat = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "6", "tool_call_id": "1"},
    ]
    ours = tokenizer.render(chat, tools=tools, add_generation_prompt=True).text
    assert server.prompt(chat, tools=tools) == ours


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_every_name_of_a_pre_tokenizer_cuts_as_we_say(known: PreTokenizer, tmp_path: Path) -> None:
    """A tokenizer trained with these regexes, so that its merges reach as far as they let it (runs of digits, of
    spaces, of signs and newlines), gives llama.cpp's ids."""
    backend = Backend(models.BPE(ignore_merges=known.ignore_merges))
    backend.pre_tokenizer = _pre_tokenizer(spell_out(known))
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:-1] * 20, trainer=trainer)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = Tokenizer(backend, config, "")
    folder = make_model(tokenizer, tmp_path / "model", **FAMILIES["llama"])
    assert export(folder, "gguf", "f32", tmp_path / "model.gguf")["pre_tokenizer"] == known.name
    server = LlamaCpp(tmp_path / "model.gguf")
    mixed = random.Random(0)
    texts = [*TEXTS[:-1], *("".join(mixed.choices(SIGNS, k=40)) for _ in range(100))]
    for text in texts:
        assert server.tokenize(text) == tokenizer.encode(text), text


SIGNS = "aB's 12٣½ \n\t\r .,!-_(你é\u00a0\u3000\U0001f600"


def _pre_tokenizer(spelled: dict) -> pre_tokenizers.PreTokenizer:
    """The live object of a tokenizer.json's pre_tokenizer."""
    spec = json.loads(Backend(models.BPE()).to_str())
    return Backend.from_str(json.dumps({**spec, "pre_tokenizer": spelled})).pre_tokenizer
