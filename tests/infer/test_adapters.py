"""LoRA adapters beside one base: each answers as if merged into the model, whoever else is in the batch."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from groundup.errors import UserError
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.params import SamplingParams
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer

TARGETS = {"q_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn", "up_proj": "mlp", "down_proj": "mlp"}
RANK, ALPHA = 3, 12


def make_adapter(folder: Path, model: Transformer, seed: int, **changed: object) -> Transformer:
    """A PEFT folder of random LoRA weights; returns the model with them merged in."""
    merged, generator, tensors = copy.deepcopy(model), torch.Generator().manual_seed(seed), {}
    for layer, block in enumerate(merged.blocks):
        for name, part in TARGETS.items():
            linear = getattr(getattr(block, part), name)
            a = torch.randn(RANK, linear.in_features, generator=generator) * 0.2
            b = torch.randn(linear.out_features, RANK, generator=generator) * 0.1
            linear.weight.data = linear.weight.data + ALPHA / RANK * b @ a
            key = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))
    save_file(tensors, folder / "adapter_model.safetensors")
    return merged


@pytest.mark.parametrize("compiled", [True, False])
def test_adapters_share_a_base(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch, compiled: bool
) -> None:
    if not compiled:
        for place in ("infer.fused", "ops.paged", "ops.linear"):
            monkeypatch.setattr(f"groundup.{place}.native", lambda name: None)
    base = copy.deepcopy(model)
    merged = {name: make_adapter(tmp_path / name, model, seed) for seed, name in enumerate(["french", "poet"])}
    engine = Engine(base, tokenizer, EngineSettings(block_size=4, num_blocks=60, max_batch_tokens=20))
    for name in merged:
        engine.load_adapter(name, tmp_path / name)
    prompt, params = [9, 8, 7, 6, 5] * 6, SamplingParams(max_tokens=12, ignore_eos=True)
    for _ in range(2):  # the second time all beginnings are known, to their own adapter alone
        names = [None, "french", "poet", "french"]
        requests = [engine.add([*prompt, i], params, adapter=name) for i, name in enumerate(names)]
        while engine.has_work:
            engine.step()
        for i, (name, request) in enumerate(zip(names, requests, strict=True)):
            alone = Engine(copy.deepcopy(merged.get(name, model)), tokenizer)
            wanted = alone.add([*prompt, i], params)
            while alone.has_work:
                alone.step()
            assert request.completions()[0].ids == wanted.completions()[0].ids
    assert requests[3].cached_tokens > 0


def test_what_is_no_adapter_is_refused(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(copy.deepcopy(model), tokenizer)
    with pytest.raises(UserError, match="is not loaded"):
        engine.add([5], SamplingParams(), adapter="nobody")
    with pytest.raises(UserError, match="no adapter can be read here"):
        engine.load_adapter("x", tmp_path)
    make_adapter(tmp_path / "dora", model, 1, use_dora=True)
    with pytest.raises(UserError, match="use_dora"):
        engine.load_adapter("x", tmp_path / "dora")
    make_adapter(tmp_path / "other", model, 1)
    save_file({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(3, 64)},
              tmp_path / "other" / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="changes nothing that this model has"):
        engine.load_adapter("x", tmp_path / "other")
