"""Pickled weights become safetensors without a line of theirs being run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_models import make_stock, save_stock
from safetensors.torch import load_file, save_file

from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.convert import convert, read_state
from groundup.model.io import load_model, save_model
from groundup.model.presets import preset
from groundup.model.transformer import Transformer
from groundup.tokenizer import load_tokenizer, train_tokenizer

IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def ours() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(preset("tiny", vocab_size=97))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model.eval()


def pickled(model: Transformer, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """A folder as old transformers left it: config.json, pytorch_model.bin with a tied head stored twice."""
    save_model(model, folder)
    (folder / "model.safetensors").unlink()
    state = {**model.state_dict(), "lm_head.weight": model.head_weight.data}
    torch.save(state, folder / "pytorch_model.bin", **options)
    return state


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_folder_with_a_bin(zipped: bool, ours: Transformer, tmp_path: Path) -> None:
    source, output = tmp_path / "old", tmp_path / "new"
    pickled(ours, source, _use_new_zipfile_serialization=zipped)
    tokenizer = train_tokenizer(["a b"], 300)
    tokenizer.save(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    report = convert(source, output)
    assert report["dropped"] == ["lm_head.weight"]
    assert report["computed_by"] == "qwen3: computed by groundup"
    assert report["parameters"] == sum(p.numel() for p in ours.parameters())
    assert report["notes"] == []
    assert torch.equal(load_model(output)(IDS), ours(IDS))
    assert load_tokenizer(output).chat_template == "{{ messages }}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
    with pytest.raises(UserError, match="exists already"):
        convert(source, output)


def test_shards(ours: Transformer, tmp_path: Path) -> None:
    """Several in, several out; the tied pair lies in two of them."""
    source, output = tmp_path / "old", tmp_path / "new"
    state = pickled(ours, source)
    (source / "pytorch_model.bin").unlink()
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, keys in parts.items():
        torch.save({key: state[key] for key in keys}, source / file)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in parts.items() for key in keys}}))
    report = convert(source, output)
    assert [name for name in report["files"] if name.endswith(".safetensors")] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert torch.equal(load_model(output)(IDS), ours(IDS))
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"names pytorch_model-00002-of-00002\.bin, which is not in the folder"):
        convert(source, tmp_path / "third")
    index.unlink()
    with pytest.raises(UserError, match="tensors are missing"):
        convert(source, tmp_path / "third")
    torch.save(state, source / "another.pth")
    with pytest.raises(UserError, match=r"is in several of another.pth, pytorch_model-00001-of-00002.bin"):
        convert(source, tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("name", ["opt", "gpt2", "phi"])
def test_architectures_that_are_not_ours(name: str, tmp_path: Path) -> None:
    theirs = save_stock(name, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    report = convert(tmp_path / "old", tmp_path / "new")
    assert report["computed_by"] == f"{name}: computed by transformers"
    assert report["dropped"] == ([] if name == "phi" else ["lm_head.weight"])
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "new")(IDS), theirs(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("wrap", ["model", "state_dict", "module.", "_orig_mod.module."])
def test_what_trainers_put_around(wrap: str, ours: Transformer, tmp_path: Path) -> None:
    """A checkpoint with an optimizer beside the weights; names of DDP and torch.compile."""
    save_model(ours, tmp_path / "home")
    state: dict[str, Any] = ours.state_dict()
    if wrap.endswith("."):
        state = {wrap + name: tensor for name, tensor in state.items()}
    else:
        state = {wrap: state, "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3}
    torch.save(state, tmp_path / "step.pth")
    convert(tmp_path / "step.pth", tmp_path / "new", config=tmp_path / "home")
    assert torch.equal(load_model(tmp_path / "new")(IDS), ours(IDS))
    convert(tmp_path / "step.pth", tmp_path / "newer", config=tmp_path / "home" / "config.json")
    assert torch.equal(load_model(tmp_path / "newer")(IDS), ours(IDS))


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["zip", "old format", "bare pickle"])
def test_a_malicious_pickle_does_not_run(kind: str, ours: Transformer, tmp_path: Path) -> None:
    source, mark = tmp_path / "old", tmp_path / "it ran"
    state = {**pickled(ours, source), "model.norm.weight": Trap(mark)}
    if kind == "bare pickle":
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    else:
        torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"pytorch_model.bin: holds more than weights.*it would run code"):
        convert(source, tmp_path / "new")
    assert not mark.exists()
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="groundup convert"):
        load_model(source)
    assert not mark.exists()
    torch.load(source / "pytorch_model.bin", weights_only=False) if kind != "bare pickle" else pickle.loads(
        (source / "pytorch_model.bin").read_bytes()
    )
    assert mark.exists(), "the trap would have sprung"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "damaged or not weights"),
        (b"not a pickle at all", "damaged or not weights|more than weights"),
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3, "loss": 0.5}, "holds no tensor by name .but epoch, loss"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
    ],
)
def test_what_is_no_state_dict(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=said):
        convert(path, tmp_path / "new")


def test_a_truncated_file(ours: Transformer, tmp_path: Path) -> None:
    pickled(ours, tmp_path / "old")
    path = tmp_path / "old" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged"):
        convert(tmp_path / "old", tmp_path / "new")


def test_sources_that_are_none(ours: Transformer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(UserError, match="holds no weights"):
        convert(tmp_path, tmp_path / "new")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="is no file of weights"):
        convert(tmp_path / "a.txt", tmp_path / "new")
    torch.save(ours.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"has no config\.json beside it; give --config DIR"):
        convert(tmp_path / "w.pth", tmp_path / "new")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        convert(tmp_path / "w.pth", tmp_path / "new", config=tmp_path / "nowhere")


def test_weights_that_do_not_fit_leave_nothing_behind(ours: Transformer, tmp_path: Path) -> None:
    source = tmp_path / "old"
    state = pickled(ours, source)
    torch.save({**state, "model.norm.weight": torch.ones(5)}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model.norm.weight is \(5,\), config.json says \(128,\)"):
        convert(source, tmp_path / "new")
    state["model.norm.weight"] = torch.full((128,), torch.nan)
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="compute no numbers"):
        convert(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# MiniMind


def minimind(normed: bool, experts: int = 0, layers: int = 2, width: int = 64, kv_heads: int = 2) -> Any:
    """A state dict as MiniMind saves it: fp16, head and embedding both."""
    generator, heads, inner = torch.Generator().manual_seed(0), 8, 128
    head_dim = width // heads

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.15 + (len(shape) == 1)).half()

    state = {"model.embed_tokens.weight": draw(6400, width), "model.norm.weight": draw(width)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            state[f"{at}self_attn.{name}_proj.weight"] = draw(rows * head_dim, width)
        state[f"{at}self_attn.o_proj.weight"] = draw(width, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{name}.weight"] = draw(width)
        for name in ("q_norm", "k_norm") if normed else ():
            state[f"{at}self_attn.{name}.weight"] = draw(head_dim)
        if experts:
            state[f"{at}mlp.gate.weight"] = draw(experts, width)
        for place in [f"experts.{i}." for i in range(experts)] or [""]:
            for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                state[f"{at}mlp.{place}{name}_proj.weight"] = draw(*shape)
    return state


def reference(state: dict[str, torch.Tensor], ids_T: torch.Tensor, eps: float) -> torch.Tensor:
    """What MiniMind computes, from its description: RMS norms, rotated halves, grouped heads, SwiGLU, one expert a
    token with weight 1 where there are experts. Logits [T, V]."""
    w = {name: tensor.float() for name, tensor in state.items()}
    heads, length = 8, len(ids_T)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w[name]

    def turn(x_THd: torch.Tensor) -> torch.Tensor:
        half = x_THd.shape[-1] // 2
        angles = torch.arange(length)[:, None] / 1e6 ** (torch.arange(half) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x_THd[..., :half], x_THd[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def swiglu(x: torch.Tensor, at: str) -> torch.Tensor:
        gate, up, down = (w[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    x = w["model.embed_tokens.weight"][ids_T]
    for layer in range(sum(name.endswith("input_layernorm.weight") for name in w)):
        at = f"model.layers.{layer}."
        h = norm(x, f"{at}input_layernorm.weight")
        head_dim = w[f"{at}self_attn.q_proj.weight"].shape[0] // heads
        q, k, v = (
            (h @ w[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, head_dim)).float() for n in ("q", "k", "v")
        )
        if f"{at}self_attn.q_norm.weight" in w:
            q, k = norm(q, f"{at}self_attn.q_norm.weight"), norm(k, f"{at}self_attn.k_norm.weight")
        q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("thd,lhd->htl", q, k) * head_dim**-0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        heard = torch.einsum("htl,lhd->thd", scores.softmax(-1), v).flatten(1)
        x = x + heard @ w[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, f"{at}post_attention_layernorm.weight")
        if f"{at}mlp.gate.weight" in w:
            chosen = (h @ w[f"{at}mlp.gate.weight"].T).argmax(-1)
            x = x + torch.stack([swiglu(h[t], f"{at}mlp.experts.{int(e)}.") for t, e in enumerate(chosen)])
        else:
            x = x + swiglu(h, f"{at}mlp.")
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    "kind, made, way",
    [
        ("qwen3", {"normed": True, "kv_heads": 4}, "qwen3: computed by groundup"),
        ("llama", {"normed": False}, "llama: computed by groundup"),
        ("qwen3_moe", {"normed": True, "experts": 4}, "qwen3_moe: computed by transformers"),
    ],
)
def test_minimind_is_a_stock_architecture(kind: str, made: dict[str, Any], way: str, tmp_path: Path) -> None:
    state = minimind(**made)
    torch.save(state, tmp_path / "full_sft_64.pth")
    report = convert(tmp_path / "full_sft_64.pth", tmp_path / "new")
    assert (report["architecture"], report["computed_by"], report["dropped"]) == (kind, way, ["lm_head.weight"])
    assert "rope_theta 1000000.0" in report["notes"][0]
    assert ("num_attention_heads 8" in report["notes"][0]) == (kind == "llama")
    assert "tokenizer.json" in report["notes"][1]
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
    ids = torch.arange(100, 130)
    with torch.no_grad():
        logits = load_model(tmp_path / "new")(ids[None])[0]
    wanted = reference(state, ids, eps=1e-5 if kind == "llama" else 1e-6)
    assert torch.allclose(logits, wanted, atol=1e-3 * float(wanted.abs().max()))
    if kind == "llama":
        assert not torch.allclose(reference(state, ids, eps=1e-2), wanted, atol=1e-3 * float(wanted.abs().max()))


def test_minimind_with_its_own_config(tmp_path: Path) -> None:
    """As its convert_model.py leaves it; nothing has to be assumed then. Without a pickle, too."""
    state = minimind(True, kv_heads=4)
    told = {
        "model_type": "minimind", "num_attention_heads": 8, "rope_theta": 5e5, "rms_norm_eps": 1e-4,
        "hidden_act": "silu", "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    for kind in ("pytorch_model.bin", "model.safetensors"):
        source = tmp_path / kind.partition(".")[2]
        source.mkdir()
        (source / "config.json").write_text(json.dumps(told))
        if kind.endswith("bin"):
            torch.save(state, source / kind)
        else:
            save_file({name: tensor.clone() for name, tensor in state.items()}, source / kind)
            with pytest.raises(UserError, match=r"'minimind' is not known to transformers; .* groundup convert"):
                load_model(source)
        report = convert(source, tmp_path / f"new-{source.name}")
        assert report["notes"] == ["no tokenizer.json was there: copy the model's own into the folder"]
        config = ModelConfig.from_dir(tmp_path / f"new-{source.name}")
        assert (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (5e5, 1e-4, 512)
    (source / "config.json").write_text(json.dumps({**told, "inference_rope_scaling": True}))
    with pytest.raises(UserError, match="inference_rope_scaling"):
        convert(source, tmp_path / "third")


def test_minimind_without_a_stock_twin(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    state = minimind(False, experts=4)
    torch.save({**state, "model.layers.0.mlp.shared_experts.0.up_proj.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="shared experts: no stock architecture computes the same"):
        convert(path, tmp_path / "new")
    torch.save({"tok_embeddings.weight": torch.ones(6400, 8), "layers.0.attention.wq.weight": torch.ones(8, 8)}, path)
    with pytest.raises(UserError, match="names of MiniMind's first version"):
        convert(path, tmp_path / "new")
    odd = minimind(False)
    odd["model.layers.0.self_attn.k_proj.weight"] = torch.ones(12, 64)
    torch.save(odd, path)
    with pytest.raises(UserError, match="64 queries and 12 keys make no whole heads of 8"):
        convert(path, tmp_path / "new")


def test_a_state_is_mapped_not_read(ours: Transformer, tmp_path: Path) -> None:
    """Several times over the same file costs no memory: tensors of one file share its storage on disk."""
    state = pickled(ours, tmp_path)
    first = read_state(tmp_path / "pytorch_model.bin")
    assert first.keys() == state.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in state.items())
    shutil.rmtree(tmp_path)
    assert torch.equal(first["model.norm.weight"], state["model.norm.weight"])
    assert make_stock("opt").config.model_type == "opt"
