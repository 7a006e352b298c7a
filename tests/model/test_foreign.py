"""Architectures that are not ours, through transformers: the same numbers, whatever a stage asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_models import CONFIGS, VOCAB, make_stock, save_stock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from groundup.errors import UserError
from groundup.model.cache import KVCache
from groundup.model.config import num_parameters
from groundup.model.flops import Flops
from groundup.model.foreign import Foreign
from groundup.model.foreign_config import ForeignConfig
from groundup.model.io import describe, load_model, read_config, save_model
from groundup.model.transformer import Transformer
from groundup.objectives.next_token import next_token
from groundup.optim.build import param_groups
from groundup.train.prepare import compile_blocks, recompute_blocks

ROWS = ((7, 1, 20, 4), (15, 17))  # documents in two rows of 36; the filler is what is left
LENGTH = 36


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder a model, made when it is first asked for."""
    root = tmp_path_factory.mktemp("foreign")

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = root / name
            save_stock(name, self[name])
            return self[name]

    return Folders()


def load(folder: Path) -> Foreign:
    model = load_model(folder)
    assert isinstance(model, Foreign)
    return model


def theirs_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, positions, documents) [2, 36] as data/batch.py lays them: the filler is document -1 and counts from 0."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
    positions, documents = torch.zeros(2, LENGTH, dtype=torch.long), torch.full((2, LENGTH), -1, dtype=torch.int32)
    for row, sizes in enumerate(ROWS):
        at = 0
        for number, size in enumerate((*sizes, LENGTH - sum(sizes))):
            positions[row, at : at + size] = torch.arange(size)
            documents[row, at : at + size] = number if number < len(sizes) else -1
            at += size
    return ids, positions, documents


def each_document(documents: torch.Tensor) -> list[tuple[int, slice]]:
    """(row, tokens) of every document, the filler left out."""
    found = []
    for row, sizes in enumerate(ROWS):
        at = 0
        for size in sizes:
            found.append((row, slice(at, at + size)))
            at += size
    return found


def loss_and_gradients(model: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(ours: torch.Tensor, theirs: torch.Tensor, within: float = 1e-4) -> bool:
    ours, theirs = ours.detach(), theirs.detach()
    return bool((ours - theirs).abs().max() <= within * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_the_hidden_states_that_the_head_multiplies(name: str, folders: dict[str, Path]) -> None:
    ours, theirs = load(folders[name]), theirs_of(folders[name])
    ids = packed()[0]
    with torch.no_grad():
        logits = theirs(ids).logits
        assert close(ours(ids), logits)
        assert close(F.linear(ours.hidden(ids), ours.head_weight), logits)
        assert close(F.linear(ours.run(theirs.get_input_embeddings()(ids)), ours.head_weight), logits)
    assert ours.config.vocab_size == VOCAB == len(ours.head_weight)
    assert len(ours.blocks) == ours.config.num_hidden_layers
    assert num_parameters(ours.config) == num_parameters(read_config(folders[name])) == theirs.num_parameters()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_computed_as_alone(name: str, folders: dict[str, Path]) -> None:
    """And so are their gradients. Windows count inside a document, positions start anew, the filler bothers nobody."""
    ours, theirs = load(folders[name]), theirs_of(folders[name])
    ids, positions, documents = packed()
    labels = torch.where(documents >= 0, ids.roll(-1, 1), -100)
    labels[:, -1] = -100
    apart = []
    for row, part in each_document(documents):
        own = ids[row : row + 1, part]
        targets = labels[row, part].clone()
        targets[-1] = labels[row, part.stop - 1] = -100  # its next token is of another document
        apart.append(F.cross_entropy(theirs(own).logits[0], targets, ignore_index=-100, reduction="sum"))
        for given in (positions, None):
            hidden = ours.hidden(ids, given, documents)[row, part]
            assert close(F.linear(hidden, ours.head_weight), theirs(own).logits[0])
    total, count = next_token(ours.hidden(ids, positions, documents), ours.head_weight, labels)
    alone = torch.stack(apart).sum()
    assert count == (labels >= 0).sum()
    assert close(total, alone)
    ours_grads, their_grads = loss_and_gradients(ours, total), loss_and_gradients(theirs, alone)
    assert ours_grads.keys() == their_grads.keys()
    for parameter, gradient in their_grads.items():
        assert close(ours_grads[parameter], gradient), parameter


def test_how_each_takes_documents_was_found_out(folders: dict[str, Path]) -> None:
    ways = {name: load(folders[name]).packing for name in CONFIGS}
    assert ways == dict.fromkeys(CONFIGS, "positions") | {
        "opt": "mask", "opt-350m": "mask", "bloom": "apart", "mamba": "apart",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma3"])
def test_recomputing_the_blocks_changes_no_gradient(name: str, folders: dict[str, Path]) -> None:
    ids, positions, documents = packed()
    gradients = []
    for recompute in (False, True):
        model = load(folders[name]).train()
        if recompute:
            recompute_blocks(model.blocks)
        total, _ = next_token(model.hidden(ids, positions, documents), model.head_weight, ids)
        gradients.append(loss_and_gradients(model, total))
    for parameter, gradient in gradients[0].items():
        assert torch.equal(gradients[1][parameter], gradient), parameter


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gptj", "bloom", "mamba")])
def test_a_cache_gives_what_the_whole_text_gives(name: str, folders: dict[str, Path]) -> None:
    """In pieces of 9, 1 and 10 tokens: other scales of scores, windows, values narrower than keys."""
    model = load(folders[name])
    assert model.servable
    ids = packed()[0][:, :20]
    with torch.no_grad():
        whole = model.hidden(ids)
        cache = KVCache(model.config, batch_size=2, max_len=20)
        pieces = [model.hidden(part, cache=cache) for part in ids.split([9, 1, 10], 1)]
        assert close(torch.cat(pieces, 1), whole)
        assert close(model.hidden(ids), whole, within=0), "the model's own attention is back"
    assert cache.lengths == [20, 20]


@pytest.mark.parametrize("name", ["gptj", "bloom", "mamba"])
def test_what_no_cache_can_serve_is_said(name: str, folders: dict[str, Path]) -> None:
    model = load(folders[name])
    assert not model.servable
    assert "answers slowly, without a cache" in describe(model)


def test_which_way_was_taken_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    assert describe(load(folders["opt"])) == "opt: computed by transformers"
    assert "each document in a row of its own" in describe(load(folders["bloom"]))
    make_stock("qwen2", use_sliding_window=False, sliding_window=None).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, Transformer)
    assert describe(ours) == "qwen2: computed by groundup"


@pytest.mark.parametrize("name", ["gpt2", "phi", "qwen3_moe", "cohere"])
def test_saved_as_transformers_saves_it(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders[name])
    with torch.no_grad():
        next(iter(model.blocks.parameters())).add_(0.5)
    for _ in range(2):  # the second time over the first
        save_model(model, tmp_path / "new")
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[name], tmp_path / "new"))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[key], after[key]) for key in before) == 1
    kept, written = (json.loads((f / "config.json").read_text()) for f in (folders[name], tmp_path / "new"))
    assert kept == written
    assert not [path.name for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]
    ids = packed()[0]
    with torch.no_grad():
        assert close(theirs_of(tmp_path / "new")(ids).logits, model(ids))


def test_a_save_that_fails_leaves_what_was_there(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    model = load(folders["opt"])
    save_model(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(folder: Path, **settings: Any) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.inner, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        save_model(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_types_of_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    make_stock("opt").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).head_weight.dtype == torch.float32
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert half.head_weight.dtype == half(packed()[0]).dtype == torch.bfloat16
    assert half.packing == "mask"  # the trial allows for its rounding
    assert load_model(folders["gemma3"], dtype=torch.bfloat16).servable


def test_shards(tmp_path: Path) -> None:
    theirs = make_stock("gpt_neox")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    ids = packed()[0]
    with torch.no_grad():
        assert close(load(tmp_path)(ids), theirs(ids).logits)
    gone = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / gone).unlink()
    with pytest.raises(UserError, match=f"names {gone}, which is not in the folder"):
        load_model(tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ffn_dim": 40}, r"fc1.bias is \(48,\), config.json says \(40,\)"),
        ({"num_hidden_layers": 3}, "16 tensors are missing, first model.decoder.layers.2"),
        ({"model_type": "opt2"}, "'opt2' is not known to transformers"),
        ({"model_type": "opt2", "auto_map": {"AutoConfig": "x.X"}}, "code of its own, which is never run"),
        ({"model_type": "t5"}, "t5 is no causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantised"),
        ({"hidden_size": "wide"}, "is no config of opt"),
    ],
)
def test_folders_that_cannot_be_used(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_stock("opt", tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=said) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_tensor_and_one_too_many(tmp_path: Path) -> None:
    save_stock("opt", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    assert describe(load_model(tmp_path)).endswith("1 tensors of the folder are not used, first extra.weight")
    del tensors["model.decoder.layers.1.fc1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing, first model\.decoder\.layers\.1\.fc1\.weight"):
        load_model(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load it"):
        load_model(tmp_path)


def test_logits_that_no_matrix_gives_are_refused(tmp_path: Path) -> None:
    """Capped ones by their config; others because the trial finds it out; and models that look ahead."""
    from transformers import BertConfig, Gemma2Config

    Gemma2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gemma2 caps its logits"):
        load_model(tmp_path)
    inner = make_stock("opt")
    config = ForeignConfig.from_stock(inner.config)
    plain = inner.forward

    def squared(**given: Any) -> Any:
        out = plain(**given)
        out.logits = out.logits**2
        return out

    inner.forward = squared
    with pytest.raises(UserError, match="are not its hidden states times its head"):
        Foreign(inner, config).try_out()
    bert = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    folder = tmp_path / "bert"
    AutoModelForCausalLM.from_config(bert).save_pretrained(folder)
    with pytest.raises(UserError, match="bert lets tokens see later ones"):
        load_model(folder)


def test_a_bias_is_part_of_the_head(folders: dict[str, Path]) -> None:
    model = load(folders["phi"])
    bias = model.inner.lm_head.bias
    assert bias is not None
    assert model.head_weight.shape == (VOCAB, 40)  # 32 + 1, filled up to a multiple of 8
    assert torch.equal(model.head_weight[:, 32], bias)
    assert not model.head_weight[:, 33:].any()


def test_replaced_parts_are_seen_by_both(folders: dict[str, Path]) -> None:
    """What an adapter or a quantiser puts in a module's place computes, whether it is put there through us or not."""
    model = load(folders["phi"])
    ids = packed()[0]
    before = model(ids)
    for owner, sign in ((model, 2.0), (model.inner, 3.0)):
        head = torch.nn.Linear(32, VOCAB)
        head.load_state_dict({name: sign * t for name, t in load(folders["phi"]).inner.lm_head.state_dict().items()})
        owner.lm_head = head
        assert model.lm_head is model.inner.lm_head is head
        assert close(model(ids), sign * before)
    model.train()
    assert model.inner.training and all(block.training for block in model.blocks)
    model.eval()
    assert not model.inner.training and not model.training


def test_compiled_blocks(folders: dict[str, Path]) -> None:
    """Whatever wraps the blocks from outside finds them: here compilation, with a backend that only counts."""
    model = load(folders["gpt2"])
    seen = []

    class Policy:
        on = True

    compile_blocks(model.blocks, Policy())  # type: ignore[arg-type]
    for block in model.blocks:
        assert block._compiled_call_impl is not None
        block.compile(backend=lambda graph, inputs: seen.append(1) or graph)
    ids, positions, documents = packed()
    hidden = model.hidden(ids, positions, documents)
    assert seen
    assert close(hidden, load(folders["gpt2"]).hidden(ids, positions, documents))


@pytest.mark.parametrize("name", ["opt", "gemma", "gptj"])
def test_operations_are_those_that_torch_counts(name: str, folders: dict[str, Path]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, theirs = (
        load(folders[name]),
        AutoModelForCausalLM.from_pretrained(folders[name], attn_implementation="eager"),
    )
    with FlopCounterMode(display=False) as counter:
        theirs(torch.zeros(2, 32, dtype=torch.long)).logits.sum().backward()
    flops, without = Flops.of(model, 32), Flops.of(model, 0)
    attention = flops(64, 64) - without(64, 64)  # ours counts the causal half of the scores, torch here all of them
    assert flops(64, 64) + attention == pytest.approx(counter.get_total_flops(), rel=0.03)


def size_of(parameters: dict[str, torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters.values() if p.ndim > 1)


def test_operations_of_experts_and_of_frozen_parts(folders: dict[str, Path]) -> None:
    model = load(folders["qwen3_moe"])
    experts = size_of({n: p for n, p in model.blocks.named_parameters() if ".experts." in n})
    others = size_of({n: p for n, p in model.blocks.named_parameters() if ".experts." not in n})
    assert Flops.of(model, 0)(1, 0) == 6 * (others + experts / 2)  # two of four experts a token
    whole = size_of(dict(load(folders["opt"]).blocks.named_parameters()))
    frozen = load(folders["opt"]).requires_grad_(False)
    assert (Flops.of(frozen, 0)(1, 0), Flops.of(frozen, 0)(0, 1)) == (2 * whole, 2 * VOCAB * 32)
    frozen.blocks[1].requires_grad_(True)
    second = size_of(dict(frozen.blocks[1].named_parameters()))
    assert Flops.of(frozen, 0)(1, 0) == 2 * (whole - second) + 6 * second
    assert Flops.of(frozen, 0)(0, 1) == 4 * VOCAB * 32
    frozen.requires_grad_(False).blocks[0].fc1.requires_grad_(True)
    assert Flops.of(frozen, 0)(1, 0) == 4 * whole + 2 * frozen.blocks[0].fc1.weight.numel()


def test_the_optimizer_knows_tables_and_blocks_by_what_they_are(folders: dict[str, Path]) -> None:
    """GPT-2 calls nothing as others do."""
    model = load(folders["gpt2"])
    names = {id(p): name.removeprefix("transformer.") for name, p in model.named_parameters()}
    groups = {kind: {names[id(p)] for p in found} for kind, found in param_groups(model, muon=True).items()}
    assert {"wte.weight", "wpe.weight", "ln_f.weight", "h.0.attn.c_attn.bias"} <= groups["plain"]
    assert (
        groups["muon"]
        == {name for name in names.values() if name.startswith("h.") and "ln" not in name} - groups["plain"]
    )
    assert len(groups["muon"]) == 2 * 4
    assert not groups["decay"]
