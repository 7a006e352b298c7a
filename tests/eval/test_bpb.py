"""Bits per byte: equal to the plain computation, document by document, and independent of packing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from groundup.errors import UserError
from groundup.eval import bpb
from groundup.eval.bpb import measure_files
from groundup.eval.run import answerer, evaluate
from groundup.infer.generate import generate
from groundup.infer.params import SamplingParams
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer

TEXTS = ["The cat sat.", "小猫坐在垫子上，看着月亮。", "the moon 🌙", "a"]
CHATS = [[("user", "Who sat?"), ("assistant", "The cat.")], [("user", "谁？"), ("assistant", "小猫")]]


def nats_of(model: Transformer, ids: list[int], mask: list[int]) -> float:
    """-sum log p of the masked tokens, from full logits of one document."""
    with torch.no_grad():
        logp = model(torch.tensor([ids])).log_softmax(-1)[0]
    return -sum(float(logp[i, ids[i + 1]]) for i in range(len(ids) - 1) if mask[i + 1])


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text(model: Transformer, tokenizer: Tokenizer, text_file: Path) -> None:
    documents = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in TEXTS]
    nats = sum(nats_of(model, ids, [1] * len(ids)) for ids in documents)
    result = measure_files(model, tokenizer, [text_file])[0]
    size = sum(len(t.encode()) for t in TEXTS)
    assert (result["kind"], result["bytes"]) == ("text", size)
    assert result["tokens"] == sum(len(ids) - 1 for ids in documents)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result["loss"] == pytest.approx(nats / result["tokens"], rel=1e-5)


def test_chats_count_what_the_assistant_says(model: Transformer, tokenizer: Tokenizer, chat_file: Path) -> None:
    rendered = [tokenizer.render([{"role": r, "content": c} for r, c in chat]) for chat in CHATS]
    nats = sum(nats_of(model, r.ids, r.mask) for r in rendered)
    result = measure_files(model, tokenizer, [chat_file])[0]
    size = len("The cat.") + len("小猫".encode())
    assert (result["kind"], result["bytes"]) == ("chat", size)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_rows_of_a_forward_pass_change_nothing(model, tokenizer, text_file, monkeypatch) -> None:
    whole = measure_files(model, tokenizer, [text_file], seq_len=20)[0]
    monkeypatch.setattr(bpb, "POSITIONS", 20)
    one_by_one = measure_files(model, tokenizer, [text_file], seq_len=20)[0]
    assert one_by_one["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-5)


def test_evaluate_a_folder(folder: Path, text_file: Path, chat_file: Path) -> None:
    result = evaluate(folder, data=[text_file, chat_file], device="cpu")
    assert [f["file"] for f in result["files"]] == [str(text_file), str(chat_file)]
    assert all(f["bits_per_byte"] > 0 for f in result["files"])
    with pytest.raises(UserError, match="nothing to measure"):
        evaluate(folder)
    with pytest.raises(UserError, match="no such file"):
        evaluate(folder, data=["missing.jsonl"], device="cpu")


def test_the_answerer_renders_and_generates(model: Transformer, tokenizer: Tokenizer) -> None:
    talks = [[{"role": "user", "content": text}] for text in ("Who sat?", "谁？")]
    prompts = [tokenizer.render(talk, add_generation_prompt=True).ids for talk in talks]
    wanted = [c.text for c in generate(model, tokenizer, prompts, SamplingParams(max_tokens=6))]
    assert answerer(model, tokenizer, max_tokens=6)(talks) == wanted
