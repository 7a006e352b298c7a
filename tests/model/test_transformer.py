"""Invariants of the model: packing, caching, initialisation, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from groundup.errors import UserError
from groundup.model.cache import KVCache
from groundup.model.config import ModelConfig, num_parameters
from groundup.model.presets import PRESETS, preset, scaled
from groundup.model.transformer import Transformer
from groundup.ops.loss import linear_cross_entropy


def random_model(model_type: str = "qwen3", **changes) -> Transformer:
    sizes = dict(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    model = Transformer(ModelConfig(**{**sizes, **heads, **changes}, model_type=model_type))
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def tokens(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def packed_rows() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Document lengths a row, positions and document ids of 40 tokens, the rest of a row filler."""
    rows = [[7, 20, 13], [40], [1, 1, 30]]
    positions, docs = torch.zeros(3, 40, dtype=torch.long), torch.full((3, 40), -1, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for index, length in enumerate(lengths):
            positions[row, start : start + length] = torch.arange(length)
            docs[row, start : start + length] = index
            start += length
    return rows, positions, docs


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_packed_rows_equal_their_documents_run_one_by_one(model_type):
    model, ids = random_model(model_type), tokens(3, 40)
    rows, positions, docs = packed_rows()
    packed = model(ids, positions, docs)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            alone = model(ids[row : row + 1, start : start + length])[0]
            torch.testing.assert_close(packed[row, start : start + length], alone, atol=1e-5, rtol=1e-4)
            start += length
    assert packed.isfinite().all()


def test_packed_gradients_equal_those_of_single_documents():
    model, ids, labels = random_model(), tokens(3, 40), tokens(3, 40, seed=3)
    rows, positions, docs = packed_rows()
    labels[docs == -1] = -100
    linear_cross_entropy(model.hidden(ids, positions, docs), model.head_weight, labels).backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, lengths in enumerate(rows):
        for piece, label in zip(
            ids[row, : sum(lengths)].split(lengths), labels[row, : sum(lengths)].split(lengths), strict=True
        ):
            linear_cross_entropy(model.hidden(piece[None]), model.head_weight, label).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_decoding_with_a_cache_equals_the_full_forward():
    model, ids = random_model().eval(), tokens(2, 12)
    cache = KVCache(model.config, batch_size=2, max_len=12)
    with torch.no_grad():
        steps = [model(ids[:, :5], cache=cache), model(ids[:, 5:8], cache=cache)]
        steps += [model(ids[:, i : i + 1], cache=cache) for i in range(8, 12)]
        torch.testing.assert_close(torch.cat(steps, 1), model(ids), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="do not fit"):
        model(ids[:, :1], cache=cache)


def test_ragged_rows_share_a_cache():
    model, ids = random_model().eval(), tokens(3, 10)
    lengths = [4, 9, 6]
    cache = KVCache(model.config, batch_size=3, max_len=16)
    with torch.no_grad():
        model(ids, cache=cache)  # right padding: what stands after a row's length is forgotten
        cache.truncate(lengths)
        fresh = tokens(3, 2, seed=5)
        first, second = model(fresh[:, :1], cache=cache), model(fresh[:, 1:], cache=cache)
        for row, length in enumerate(lengths):
            alone = model(torch.cat([ids[row, :length], fresh[row]])[None])[0, -2:]
            torch.testing.assert_close(torch.cat([first[row], second[row]]), alone, atol=1e-5, rtol=1e-4)
        cache.select([2, 0])
        assert cache.lengths == [8, 6]
        again = model(fresh[:2, :1], cache=cache)
        alone = model(torch.cat([ids[0, :4], fresh[0], fresh[1, :1]])[None])[0, -1]
        torch.testing.assert_close(again[1, 0], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="lengthen"):
        cache.truncate([99, 1])


def test_checkpointing_from_outside_changes_nothing():
    model, ids, labels = random_model(), tokens(2, 16), tokens(2, 16, seed=3)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        linear_cross_entropy(model.hidden(ids), model.head_weight, labels).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    for block in model.blocks:
        block.forward = lambda *args, forward=block.forward: checkpoint(forward, *args, use_reentrant=False)
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)


def test_init_is_a_function_of_the_seed_and_starts_near_uniform():
    a, b, c = (Transformer(preset("tiny", vocab_size=512)) for _ in range(3))
    for model, seed in ((a, 0), (b, 0), (c, 1)):
        model.init_weights(seed)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head_weight, c.head_weight)
    ids, labels = tokens(2, 64), tokens(2, 64, seed=3)
    loss = linear_cross_entropy(a.hidden(ids), a.head_weight, labels) / labels.numel()
    assert abs(loss.item() - torch.tensor(512.0).log().item()) < 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_that_their_name_says(name):
    config = preset(name)
    millions = {"tiny": 1.6, "5m": 4.8, "small-26m": 25.8, "base-64m": 63.9, "base-104m": 104.0}[name]
    assert num_parameters(config) / 1e6 == pytest.approx(millions, abs=0.06)
    assert config.model_type == "qwen3" and config.tie_word_embeddings


def test_preset_errors_and_the_one_dial():
    with pytest.raises(UserError, match="one of tiny"):
        preset("huge")
    with pytest.raises(UserError):
        scaled(0)
    sizes = [num_parameters(scaled(depth)) for depth in range(1, 17)]
    assert sizes == sorted(sizes)
    for depth in range(1, 17):
        config = scaled(depth, vocab_size=100)
        assert config.head_dim in (32, 64) and config.vocab_size == 100
        assert config.num_attention_heads * config.head_dim == config.hidden_size
    model = Transformer(scaled(2, 100))
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_bf16_autocast_on_the_cpu_trains():
    model, ids, labels = random_model(), tokens(2, 32), tokens(2, 32, seed=3)
    exact = linear_cross_entropy(model.hidden(ids), model.head_weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(model.hidden(ids), model.head_weight, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
