"""More rows for more tokens: old logits stay, new rows start as the mean of what spelled them before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import save_stock
from transformers import AutoModelForCausalLM, AutoTokenizer

from groundup.data.texts import extend_tokenizer_on
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.io import load_model, save_model
from groundup.model.resize import resize_embeddings, resize_folder
from groundup.model.transformer import Transformer
from groundup.tokenizer import load_tokenizer, train_tokenizer
from groundup.world import World

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
PIECES = {300: [7, 9], 301: [5, 6, 8], 302: [7, 9, 5]}


def make(rows: int, model_type: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(ModelConfig(rows, **SHAPE, model_type=model_type, tie_word_embeddings=tied))
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.to(dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 7, 9, 250, 5]]))


@pytest.mark.parametrize(("model_type", "tied"), [("llama", False), ("qwen2", True), ("qwen3", True)])
@pytest.mark.parametrize(
    ("rows", "ids", "grown"),
    [(300, 303, 303), (320, 303, 320), (320, 330, 384), (301, 303, 303)],
    ids=["exact", "padded", "multiple of 64", "odd"],
)
def test_old_ids_keep_their_logits_and_new_rows_are_means(
    model_type: str, tied: bool, rows: int, ids: int, grown: int
) -> None:
    model = make(rows, model_type, tied)
    before, old = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    resize_embeddings(model, ids, PIECES)
    assert model.config == replace(make(rows, model_type, tied).config, vocab_size=grown)
    after = logits(model)
    assert after.shape[-1] == grown
    torch.testing.assert_close(after[..., :300], before[..., :300], atol=1e-6, rtol=1e-6)
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    now = dict(model.named_parameters())
    assert now.keys() == old.keys() and all(torch.equal(now[n], old[n]) for n in old if n not in names)
    for name in names:
        assert torch.equal(now[name][:300], old[name][:300]) and now[name].shape == (grown, 32)
        for number, spelled in PIECES.items():
            torch.testing.assert_close(now[name][number], torch.stack([old[name][i] for i in spelled]).mean(0))
        if grown > max(rows, 303):  # rows that nothing asks for
            torch.testing.assert_close(now[name][-1], old[name].mean(0))
    # the logit of a new piece is the mean of its old pieces' (the head is linear)
    torch.testing.assert_close(after[..., 300], before[..., [7, 9]].mean(-1), atol=1e-5, rtol=1e-5)


def test_the_new_rows_learn() -> None:
    model = make(300, "qwen3", tied=True)
    resize_embeddings(model, 303, PIECES)
    assert model.head_weight is model.model.embed_tokens.weight
    model(torch.tensor([[301, 4]]))[..., 302].sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None and gradient[301].abs().sum() > 0 and gradient[302].abs().sum() > 0
    frozen = make(300)
    frozen.requires_grad_(False)
    resize_embeddings(frozen, 303, PIECES)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_half_precision_is_averaged_in_full() -> None:
    model = make(300, dtype=torch.bfloat16)
    old = model.model.embed_tokens.weight.detach().clone()
    resize_embeddings(model, 303, {300: list(range(299))})
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight[300], old[:299].float().mean(0).bfloat16())


@pytest.mark.parametrize("name", ["opt", "gptj", "gpt_neox", "gemma"])
def test_what_transformers_computes_is_resized_too(name: str, tmp_path: Path) -> None:
    save_stock(name, tmp_path / "base")
    model: Any = load_model(tmp_path / "base")
    rows = model.config.vocab_size
    ids = torch.tensor([[3, 7, 9, 12, 5]])
    with torch.no_grad():
        before = model(ids)
        head, bias = model.inner.get_output_embeddings().weight.clone(), model.inner.get_output_embeddings().bias
        bias = None if bias is None else bias.clone()
        resize_embeddings(model, rows + 3, {rows: [7, 9], rows + 1: [5]})
        after = model(ids)
    assert model.config.vocab_size == rows + 3 == after.shape[-1]
    torch.testing.assert_close(after[..., :rows], before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[..., rows], before[..., [7, 9]].mean(-1), atol=1e-4, rtol=1e-4)
    again = model.inner.get_output_embeddings()
    torch.testing.assert_close(again.weight[rows], head[[7, 9]].mean(0))
    assert bias is None or torch.equal(again.bias[rows + 1], bias[5])
    save_model(model, tmp_path / "new")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, after, atol=1e-5, rtol=1e-5)


def test_a_piece_that_lies_outside_is_refused() -> None:
    with pytest.raises(UserError, match="id 300 lies outside"):
        resize_embeddings(make(300), 301, {300: [7, 400]})
    with pytest.raises(UserError, match="id 305 lies outside"):
        resize_embeddings(make(300), 301, {305: [7]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_folder_is_extended_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tokenizer and model of a folder, then loaded by transformers: old ids, old logits; new text in fewer tokens."""
    base, output, data = tmp_path / "base", tmp_path / "new", tmp_path / "new.jsonl"
    documents = list(World(seed=0).documents(600))
    chinese = [one for one in documents if any("\u4e00" <= char <= "\u9fff" for char in one)]
    english = [one for one in documents if one.isascii()]
    old = train_tokenizer(english, 320)
    old.save(base)
    rows = -(-old.vocab_size // 64) * 64
    save_model(make(rows, "qwen3", tied=True, dtype=dtype), base)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 0]}')
    data.write_text("".join(json.dumps({"text": one}) + "\n" for one in chinese))
    summary, pieces = extend_tokenizer_on(base, [data], 90, output)
    resized = resize_folder(base, output, summary["vocab_size"], pieces)
    assert resized["rows_before"] == rows and resized["rows"] == -(-summary["vocab_size"] // 64) * 64
    new = load_tokenizer(output)
    assert new.stop_ids == [0, 2] and summary["new_text"]["after"]["tokens_per_character"] < 2
    stock = AutoModelForCausalLM.from_pretrained(output).eval()
    assert stock.dtype == dtype and stock.config.vocab_size == resized["rows"]
    assert stock.generation_config.temperature == 0.6 and resized["parameters"] == stock.num_parameters()
    ids = torch.tensor([AutoTokenizer.from_pretrained(output)(english[0])["input_ids"]])
    assert ids[0].tolist() == old.encode(english[0])
    with torch.no_grad():
        ours, theirs = load_model(base, dtype=dtype)(ids), stock(ids).logits
    bound = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    torch.testing.assert_close(theirs[..., : old.vocab_size], ours[..., : old.vocab_size], **bound)
