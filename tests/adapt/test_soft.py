"""Soft prompts: PEFT's numbers, files both ways, and packed rows in which every document has the prompt before it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from groundup.adapt.soft import SoftPrompt, load_soft, soft_prompt
from groundup.config import AdaptConfig
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.io import load_model
from groundup.model.transformer import Transformer
from groundup.objectives.next_token import next_token
from groundup.tokenizer import train_tokenizer
from groundup.train.prepare import recompute_blocks

peft = pytest.importorskip("peft", reason="the reference of every soft prompt")
transformers = pytest.importorskip("transformers", reason="the models below PEFT")

FAMILIES = ("llama", "qwen2", "qwen3")
METHODS = ("prompt", "p_tuning", "prefix", "p_tuning_v2")
N, VOCAB = 5, 97


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random model of each family; norms and biases random, too."""
    made = {}
    for family in FAMILIES:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            family, vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12 if family == "qwen2" else 16, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        made[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(made[family])
    return made


def stock(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def wanted(method: str, **changes: Any) -> AdaptConfig:
    width = 24 if method in ("p_tuning", "prefix") else None
    return AdaptConfig(**{"method": method, "tokens": N, "width": width, **changes})


def shaken(adapted: SoftPrompt) -> SoftPrompt:
    """As after some training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.forward_model().encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapted


def in_peft(adapted: SoftPrompt, base: Path, folder: Path) -> nn.Module:
    """Our adapter's folder, opened by PEFT."""
    folder.mkdir(exist_ok=True)
    save_file(adapted.tensors(), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**adapted.settings(), "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return peft.PeftModel.from_pretrained(stock(base), folder).eval()


def from_peft(base: Path, folder: Path) -> SoftPrompt:
    settings = json.loads((folder / "adapter_config.json").read_text())
    return load_soft(load_model(base), settings, load_file(folder / "adapter_model.safetensors"))


def ids(length: int = 30, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Logits of the real tokens; PEFT gives those of virtual ones, too, where it puts embeddings before the others."""
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()), theirs(ids()).logits[:, -30:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_our_files_in_peft(folders: dict[str, Path], tmp_path: Path, family: str, method: str) -> None:
    adapted = shaken(soft_prompt(load_model(folders[family]), wanted(method), seed=1))
    theirs = in_peft(adapted, folders[family], tmp_path / "adapter")
    assert_same(adapted.forward_model(), theirs)
    with torch.no_grad():  # and the prompt does something
        assert (adapted.model(ids()) - adapted.forward_model()(ids())).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*METHODS, "lstm"])
def test_peft_files_in_ours(folders: dict[str, Path], tmp_path: Path, family: str, method: str) -> None:
    """Held against PEFT's model as it trained, its encoder still there."""
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**common),
        "p_tuning": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=24),
        "lstm": lambda: peft.PromptEncoderConfig(
            **common, encoder_hidden_size=24, encoder_reparameterization_type="LSTM"
        ),
        "prefix": lambda: peft.PrefixTuningConfig(**common, encoder_hidden_size=24, prefix_projection=True),
        "p_tuning_v2": lambda: peft.PrefixTuningConfig(**common),
    }[method]()
    torch.manual_seed(2)
    theirs = peft.get_peft_model(stock(folders[family]), config).eval()
    theirs.save_pretrained(tmp_path)
    adapted = from_peft(folders[family], tmp_path)
    assert_same(adapted.forward_model(), theirs)
    back = in_peft(adapted, folders[family], tmp_path / "back")
    assert_same(adapted.forward_model(), back)
    assert adapted.settings()["peft_type"] == config.peft_type


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_peft(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    """From the same parameters of the encoder, by name. In PEFT's model the labels are shifted inside, and the first
    would be foreseen by the last virtual token; here a document's first token is foreseen by nobody."""
    adapted = shaken(soft_prompt(load_model(folders["qwen3"]), wanted(method), seed=1))
    ours = adapted.forward_model()
    settings = {k: v for k, v in adapted.settings().items() if k != "peft_type"} | {"inference_mode": False}
    kinds = {"prompt": peft.PromptTuningConfig, "p_tuning": peft.PromptEncoderConfig}
    config = kinds.get(method, peft.PrefixTuningConfig)(**settings)
    theirs = peft.get_peft_model(stock(folders["qwen3"]), config)
    encoder = theirs.prompt_encoder["default"]
    encoder.load_state_dict(ours.encoder.state_dict())
    labels = ids()
    labels[:, 0] = -100
    theirs(input_ids=ids(), labels=labels).loss.backward()
    labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss, count = next_token(ours.hidden(ids()), ours.head_weight, labels)
    (loss / count).backward()
    grads = {name: p.grad for name, p in encoder.named_parameters()}
    for name, parameter in ours.encoder.named_parameters():
        assert grads[name].abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in adapted.model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_rows_equal_each_document_alone(folders: dict[str, Path], method: str, recompute: bool) -> None:
    """Hidden states and gradients; with the blocks computed twice (activation checkpointing), too."""
    adapted = shaken(soft_prompt(load_model(folders["llama"]), wanted(method), seed=1))
    model = adapted.forward_model()
    lengths = [[7, 1, 12, 10], [25, 5]]
    rows = [torch.cat([ids(n, seed=10 * r + n) for n in row], 1) for r, row in enumerate(lengths)]
    docs = torch.stack([torch.tensor([i for i, n in enumerate(row) for _ in range(n)]) for row in lengths])
    docs[1, 25:] = -1  # filler
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    weights = torch.randn(30, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    parameters = list(model.encoder.parameters())
    alone = [model.hidden(part)[0] for row, inside in zip(rows, lengths, strict=True) for part in row.split(inside, 1)]
    loss = sum((part * weights[: len(part)]).sum() for part in alone[:-1])
    wanted_grads = torch.autograd.grad(loss, parameters)
    if recompute:
        recompute_blocks(model.blocks)
    packed = model.hidden(torch.cat(rows), places, docs)
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), rtol=1e-5, atol=1e-5)
    loss = (packed[docs >= 0] * torch.cat([weights[: len(part)] for part in alone[:-1]])).sum()
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_is_a_function_of_the_seed(folders: dict[str, Path], method: str) -> None:
    base = load_model(folders["qwen3"])
    before = torch.random.get_rng_state()
    first, again, other = (soft_prompt(base, wanted(method), seed=seed).tensors() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    (name,) = first
    assert name == "prompt_embeddings"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("method", METHODS)
def test_what_moves_and_goes_into_a_checkpoint_is_the_encoder(folders: dict[str, Path], method: str) -> None:
    """A step changes the prompt and nothing else; the parameters that moved, put into a fresh one, are all of it."""
    adapted = soft_prompt(load_model(folders["qwen2"]), wanted(method), seed=1)
    frozen = copy.deepcopy(adapted.model.state_dict())
    model = adapted.forward_model()
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert moving.keys() == {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}
    before = adapted.tensors()["prompt_embeddings"]
    optimizer = torch.optim.SGD(moving.values(), lr=0.1)
    next_token(model.hidden(ids()), model.head_weight, ids())[0].backward()
    optimizer.step()
    after = adapted.tensors()["prompt_embeddings"]
    assert not torch.equal(before, after)
    assert all(torch.equal(tensor, adapted.model.state_dict()[name]) for name, tensor in frozen.items())
    fresh = soft_prompt(load_model(folders["qwen2"]), wanted(method), seed=7)
    fresh.forward_model().load_state_dict({name: p.detach() for name, p in moving.items()}, strict=False)
    assert torch.equal(fresh.tensors()["prompt_embeddings"], after)


def test_a_prompt_starts_from_words(folders: dict[str, Path]) -> None:
    """Over and over until there are enough; without a text, from some words of the vocabulary."""
    tokenizer = train_tokenizer(["abcd " * 20], 290)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    base = Transformer(ModelConfig(tokenizer.vocab_size, **sizes, num_key_value_heads=1, head_dim=8))
    base.init_weights(0)
    words = tokenizer.encode("dcba")
    table = soft_prompt(base, wanted("prompt", text="dcba", tokens=2 * len(words) + 1), 0, tokenizer).tensors()
    expected = base.model.embed_tokens.weight[words + words + words[:1]]
    assert torch.equal(table["prompt_embeddings"], expected)
    short = soft_prompt(base, wanted("prompt", text="dcba", tokens=1), 0, tokenizer).tensors()
    assert torch.equal(short["prompt_embeddings"], expected[:1])
    any_words = soft_prompt(base, wanted("prompt"), 0).tensors()["prompt_embeddings"]
    assert all((row == base.model.embed_tokens.weight).all(1).any() for row in any_words)


@pytest.mark.parametrize("tokens", [1, 11])
def test_p_tuning_v2_starts_as_the_words_themselves(folders: dict[str, Path], tokens: int) -> None:
    """Before the first step its prefix is that of a prompt of the same words."""
    base = load_model(folders["qwen3"])
    words, direct = (soft_prompt(base, wanted(m, tokens=tokens), seed=4) for m in ("prompt", "p_tuning_v2"))
    with torch.no_grad():
        torch.testing.assert_close(direct.forward_model()(ids()), words.forward_model()(ids()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_merged_the_model_itself_has_the_prompt(folders: dict[str, Path], method: str) -> None:
    """With and without packing; after more steps the newer one; a second prompt is refused."""
    adapted = soft_prompt(load_model(folders["llama"]), wanted(method), seed=1)
    base, model = adapted.model, adapted.forward_model()
    docs = torch.tensor([[0] * 12 + [1] * 18])
    places = torch.cat([torch.arange(12), torch.arange(18)])[None]
    for _ in range(2):
        adapted.merge()
        assert base.soft_prefix is not None and not base.soft_prefix[0][0].requires_grad
        with torch.no_grad():
            assert torch.equal(base(ids()), model(ids()))
            assert torch.equal(base(ids(), places, docs), model(ids(), places, docs))
        shaken(adapted)
        with torch.no_grad():
            assert not torch.equal(base(ids()), model(ids()))
    assert not any("prefix" in name for name in base.state_dict())
    with pytest.raises(UserError, match="soft prompt already"):
        soft_prompt(base, wanted(method), seed=2).merge()


class Stranger(nn.Module):
    config = type("Config", (), {"model_type": "opt"})()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "prefix", "text": "words"}, "prefix does not start from words"),
        ({"method": "prompt", "text": "words"}, "needs a tokenizer"),
        ({"method": "prompt", "save": ["lm_head"]}, "adapt.save: a soft prompt changes no module"),
        ({"method": "prompt", "tokens": 63}, "63 leave no room in the model's context of 64"),
    ],
)
def test_recipes_that_cannot_be(folders: dict[str, Path], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        soft_prompt(load_model(folders["llama"]), AdaptConfig(**{"tokens": N, **changes}), seed=0)


def test_an_empty_text_and_a_strange_model(folders: dict[str, Path]) -> None:
    tokenizer = train_tokenizer(["abcd " * 20], 290)
    with pytest.raises(UserError, match=r"adapt\.text: is empty"):
        soft_prompt(load_model(folders["llama"]), wanted("prompt", text=""), 0, tokenizer)
    with pytest.raises(UserError, match=r"adapt\.method=prefix.* not opt; use lora"):
        soft_prompt(Stranger(), wanted("prefix"), 0)


@pytest.mark.parametrize(
    ("method", "settings", "tensors", "said"),
    [
        ("prompt", {}, {"prompt_embeddings": torch.zeros(N, 40)}, r"is \(5, 40\), this model takes \(5, 48\)"),
        ("prompt", {"num_virtual_tokens": 6}, {}, r"is \(5, 48\), this model takes \(6, 48\)"),
        ("p_tuning_v2", {"num_attention_heads": 4}, {}, "has 4 key heads, this model 2"),
        ("prompt", {"num_virtual_tokens": None}, {}, "num_virtual_tokens is None"),
        ("prompt", {"num_transformer_submodules": 2}, {}, "causal model"),
        ("prompt", {}, {"lm_head.weight": torch.zeros(1)}, "holds lm_head.weight"),
    ],
)
def test_files_that_do_not_fit(
    folders: dict[str, Path], method: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor], said: str
) -> None:
    adapted = soft_prompt(load_model(folders["llama"]), wanted(method), seed=0)
    settings, tensors = adapted.settings() | settings, adapted.tensors() | tensors
    with pytest.raises(UserError, match=said):
        load_soft(load_model(folders["llama"]), settings, tensors)


def test_a_file_without_the_prompt(folders: dict[str, Path]) -> None:
    adapted = soft_prompt(load_model(folders["llama"]), wanted("prompt"), seed=0)
    with pytest.raises(UserError, match="holds no prompt_embeddings"):
        load_soft(load_model(folders["llama"]), adapted.settings(), {})
