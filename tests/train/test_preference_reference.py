"""The reference: a copy, the base below an adapter, or what it once said; it never moves, and drops nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_helpers import (
    LORA,
    make_land,
    moved,
    opened,
    tuned,
)
from safetensors.torch import load_file, save_file
from train_helpers import figures, furthest, weights

from groundup.errors import UserError
from groundup.tokenizer import load_tokenizer
from groundup.train import reference as reference_module
from groundup.train.reference import frozen_copy, without_dropout

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def land(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_land(tmp_path_factory.mktemp("land"), ground)


@pytest.mark.parametrize("how", ["copy", "adapter", "foreign"])
def test_a_policy_that_has_not_moved_loses_exactly_ln_2(how: str, land: Path, tmp_path: Path) -> None:
    settings = tuned(land, tmp_path, {}, adapt=LORA if how == "adapter" else {})
    if how == "foreign":  # a model with dropout of its own, which must be off
        settings["model"] = str(gpt2_with_dropout(land, tmp_path / "gpt2"))
    stage, model, _ = opened(settings)
    for batch in stage.fetch(0, 2):
        loss, count, metrics = stage.loss(model, batch)
        exactly = torch.full((int(count),), math.log(2)).sum().item()
        assert loss.item() == pytest.approx(exactly, rel=0 if how == "copy" else 1e-6, abs=0)
        assert metrics["rewards/margins"].abs().item() <= (0 if how == "copy" else 1e-4)


def gpt2_with_dropout(land: Path, folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = load_tokenizer(land / "model")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    assert config.attn_pdrop == config.resid_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_whatever_drops_at_random_is_off() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = without_dropout(LlamaForCausalLM(LlamaConfig(vocab_size=50, attention_dropout=0.5, **sizes)).train())
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.3)).train()
    assert without_dropout(layer)[1].p == 0.0  # type: ignore[index, union-attr]


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
def test_references_agree_however_they_are_kept(method: str, land: Path, tmp_path: Path, run: Run) -> None:
    """A frozen copy, the base below the adapter, and what it said once: the same training."""
    adapt = {"full": {}, "freeze": {"method": "freeze", "last": 1}, "lora": LORA | {"save": ["embed_tokens"]}}[method]
    found = {}
    for how in ["copy", "cached"] + ["adapter"] * (method == "lora"):
        settings = tuned(land, tmp_path, {"reference": how}, output=how, adapt=adapt)
        run(settings)
        name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
        found[how] = load_file(Path(settings["output"]) / name), figures(settings["output"])
    for how, (tensors, lines) in found.items():
        apart = [(tensors[n] - t).abs().mean().item() for n, t in found["copy"][0].items()]
        assert max(apart) < 1e-5, how  # Adam makes whole steps of gradients that are nothing but rounding
        for ours, theirs in zip(found["copy"][1], lines, strict=True):
            sure = [{k: v for k, v in line.items() if "accuracies" not in k} for line in (ours, theirs)]
            assert sure[0] == pytest.approx(sure[1], rel=1e-3, abs=2e-4), how
    assert found["copy"][1][0]["rewards/margins"] != 0


def test_the_reference_stays_where_the_policy_began(land: Path, tmp_path: Path) -> None:
    for adapt in ({}, LORA, LORA | {"save": ["embed_tokens"]}, {"method": "prompt", "tokens": 4}):
        stage, model, begun = opened(tuned(land, tmp_path, {}, adapt=adapt))
        assert stage.reference is not None
        batch = stage.fetch(0, 1)[0]
        said = reference_module.answer_logps(model, batch).detach()
        moved(model, 0.05)
        with stage.reference() as base, torch.no_grad():
            before = reference_module.answer_logps(base, batch)
        if "method" not in adapt or adapt["method"] == "lora":
            torch.testing.assert_close(before, said)
        after = reference_module.answer_logps(model, batch)
        assert (after - before).abs().max() > 0.1, "the adapter is on again, with what it has learnt"
        grads = torch.autograd.grad(after.sum(), [p for p in model.parameters() if p.requires_grad])
        assert all(g.isfinite().all() for g in grads) and max(g.abs().max() for g in grads) > 0
        if begun.adapted is not None:
            assert stage.reference == begun.adapted.off, "no second model"


def test_a_copy_shares_what_does_not_move(land: Path, tmp_path: Path) -> None:
    stage, model, _ = opened(tuned(land, tmp_path, {}, adapt={"method": "freeze", "last": 1}))
    assert stage.reference is not None
    with stage.reference() as copied:
        own = {id(p): p for p in model.parameters()}
        apart = [p for p in copied.parameters() if id(p) not in own]
        assert sum(p.numel() for p in apart) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    half = frozen_copy(model, torch.bfloat16)
    assert half.blocks[1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert half.blocks[0].mlp.up_proj.weight.dtype == torch.float32, "it is the policy's own"


def test_what_the_reference_said_is_computed_once(
    land: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    real = reference_module.Kept._compute

    def counting(self: Any, data: Any, rows: Any, *rest: Any) -> Any:
        computed.extend(rows.tolist())
        return real(self, data, rows, *rest)

    monkeypatch.setattr(reference_module.Kept, "_compute", counting)
    cache = str(tmp_path / "cache")
    settings = tuned(land, tmp_path, {"reference": "cached"}, cache=cache)
    run(settings)
    (file,) = Path(cache).glob("preference-*/reference-*.bin")
    stored = np.fromfile(file, np.float32)
    assert len(stored) == 2 * 96 and np.isfinite(stored).all() and (stored < 0).all()
    first = len(computed)
    assert first > 0
    run(tuned(land, tmp_path, {"reference": "cached", "beta": 0.3}, cache=cache, output="again"))
    assert len(computed) == first, "another run over the same tokens and weights"

    stored[:50] = np.nan  # killed in the middle
    stored.tofile(file)
    run(tuned(land, tmp_path, {"reference": "cached"}, cache=cache, output="resumed"))
    assert 0 < len(computed) - first < first
    assert furthest(weights(tmp_path / "run"), weights(tmp_path / "resumed")) < 1e-6

    model = tmp_path / "model"  # other weights are another reference
    model.mkdir()
    for path in (land / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    changed = load_file(model / "model.safetensors")
    changed["model.norm.weight"] += 0.1
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    run(tuned(land, tmp_path, {"reference": "cached"}, cache=cache, model=str(model), output="other"))
    assert len(list(Path(cache).glob("preference-*/reference-*.bin"))) == 2


def test_another_reference_is_refused_when_a_run_goes_on(land: Path, tmp_path: Path, run: Run) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in (land / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    settings = tuned(land, tmp_path, {}, model=str(model))
    run(settings)
    (tmp_path / "run" / "done.json").unlink()
    changed = load_file(model / "model.safetensors")
    changed["model.norm.weight"][0] += 1
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights have changed since"):
        run(settings)


@pytest.mark.parametrize("save", ["embed_tokens", "q_proj"])
def test_in_half_precision_the_reference_leaves_no_trace_in_the_policy(save: str, land: Path, tmp_path: Path) -> None:
    """autocast keeps what it has cast: a weight that the reference used first, with other numbers and no gradient."""
    adapt = LORA | {"target": ["k_proj", "v_proj"], "save": [save]}
    stage, model, _ = opened(tuned(land, tmp_path, {}, adapt=adapt, **{"train.dtype": "bf16"}))
    moved(model, 0.05)
    batch = stage.fetch(0, 1)[0]
    found = []
    for known in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = stage.loss(model, batch)
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
        if not known:  # the second time it has nothing to ask the reference
            with torch.autocast("cpu", torch.bfloat16):
                batch.reference_D = stage.answers(model, batch).reference_D
    (first, grads), (second, others) = found
    assert first == pytest.approx(second, rel=1e-6) and grads.keys() == others.keys()
    assert any(save in name and grad.abs().max() > 0 for name, grad in grads.items())
    assert all(torch.equal(grad, others[name]) for name, grad in grads.items())
