"""A stage's step against TRL's own trainers, live: skipped where trl is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_helpers import (
    make_land,
    mismatch_by_hand,
    moved,
    opened,
    told,
    tuned,
)

from groundup.data.documents import Document, documents
from groundup.model.io import save_model

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def land(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_land(tmp_path_factory.mktemp("land"), ground)


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("trl", reason="the live oracle: TRL's own trainers")
    sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
    import trl_preference

    yield trl_preference
    sys.path.pop(0)


@pytest.mark.parametrize("name", ["dpo", "robust", "ipo", "hinge", "apo_zero", "apo_down", "forward_kl", "kto"])
def test_a_step_is_that_of_trl(name: str, land: Path, tmp_path: Path, trl: Any) -> None:
    """Loss and gradients of a stage's batch, by TRL's trainer over transformers' model of the same folder."""
    from transformers import AutoModelForCausalLM

    settings = told(name) | ({"sft_weight": 0.0} if name == "forward_kl" else {})
    settings.pop("desirable_weight", None)
    stage, model, _ = opened(tuned(land, tmp_path, settings))
    moved(model, 0.02)
    save_model(model, tmp_path / "moved")  # type: ignore[arg-type]
    window = stage.fetch(0, 1)
    loss, count, _ = stage.loss(model, window[0])
    (loss / count).backward()
    policy, base = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (tmp_path / "moved", land / "model")
    )
    found = [one for row in documents(window[0]) for one in row]
    make = trl.kto_trainer if name == "kto" else trl.dpo_trainer
    trainer = make(tmp_path / "trl", policy, base)
    trainer.beta = 0.1
    if name == "kto":
        inputs = laid(found, trl) | {f"KL_{k}": v for k, v in laid(mismatch_by_hand(window, 128), trl).items()}
        inputs["label"] = window[0].wanted_D
    else:
        inputs = laid(found[0::2] + found[1::2], trl)
        trainer.loss_types = ["sigmoid" if settings["loss"] == "dpo" else settings["loss"]]
        trainer.label_smoothing = settings.get("label_smoothing", 0.0)
        trainer.f_divergence_type = settings.get("f_divergence_type", "reverse_kl")
    theirs = trainer._compute_loss(policy, inputs, False)
    assert (loss / count).item() == pytest.approx(theirs.item(), rel=1e-4)
    theirs.backward()
    grads = dict(policy.named_parameters())
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n].grad, rtol=1e-3, atol=1e-5 * max(largest, 1.0), msg=n)


def laid(found: list[Document], trl: Any) -> dict[str, torch.Tensor]:
    """As TRL's collator: the answers' own tokens are those that are trained here."""
    inputs: dict[str, torch.Tensor] = trl.padded([(one.ids.tolist(), one.begin) for one in found])
    for row, one in enumerate(found):
        inputs["completion_mask"][row] = 0
        inputs["completion_mask"][row, 1 : len(one.ids)] = torch.from_numpy((one.labels[:-1] >= 0).astype(np.int64))
    return inputs
