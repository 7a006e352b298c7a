"""Marks weigh more: single tokens by their id, marks in pieces by their text, and only where they are trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_helpers import figures

from groundup.config import build_recipe
from groundup.data.batch import Batch
from groundup.dist import World
from groundup.model.io import load_model
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.train.sft import SFT
from groundup.train.stage import Place
from groundup.train.tags import TagWeights

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def tokenizer(ground: Path) -> Tokenizer:
    return load_tokenizer(ground / "tok")


def batch_of(ids: list[int], trained: list[int]) -> Batch:
    """One row; labels are the ids one place earlier, where they are trained."""
    labels = [*(i if t else -100 for i, t in zip(ids[1:], trained[1:], strict=True)), -100]
    places = torch.arange(len(ids))[None]
    return Batch(torch.tensor([ids]), torch.tensor([labels]), places, torch.zeros_like(places, dtype=torch.int32))


def heavy_text(tokenizer: Tokenizer, batch: Batch, weight: float = 10.0) -> list[str]:
    """The runs of labels that weigh more, as text."""
    weights = TagWeights(tokenizer, weight)(batch).weights_BT
    assert weights is not None and set(weights.unique().tolist()) <= {1.0, weight}
    runs: list[list[int]] = [[]]
    for label, w in zip(batch.labels_BT[0].tolist(), weights[0].tolist(), strict=True):
        if w == weight:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_thoughts_and_answers_are_found_in_a_chat(tokenizer: Tokenizer) -> None:
    said = {"role": "assistant", "reasoning_content": "the cat sat.", "content": "<answer>42</answer> is > 3 </p>"}
    rendered = tokenizer.render([{"role": "user", "content": "<answer>? <think>"}, said])
    assert tokenizer.backend.token_to_id("<think>") is not None  # found by id
    assert tokenizer.backend.token_to_id("<answer>") is None  # found by text
    found = heavy_text(tokenizer, batch_of(rendered.ids, rendered.mask))
    assert [text.strip() for text in found] == ["<think>", "</think>", "<answer>", "</answer>"]


def test_a_mark_inside_larger_pieces_weighs_all_of_them(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("sat.</answer>.")
    pieces = [tokenizer.decode([i]) for i in ids]
    batch = batch_of([tokenizer.bos_id, *ids], [0] + [1] * len(ids))
    found = "".join(heavy_text(tokenizer, batch))
    assert "</answer>" in found and len(found) < len("".join(pieces))


def test_a_mark_cut_by_what_is_not_trained_is_none(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("<answer>")]
    assert len(ids) > 3
    for hidden in range(1, len(ids)):
        trained = [1] * len(ids)
        trained[hidden] = 0
        assert not heavy_text(tokenizer, batch_of(ids, trained))
    assert heavy_text(tokenizer, batch_of(ids, [1] * len(ids))) == ["<answer>"]


def test_weight_one_leaves_the_batch_as_it_is(tokenizer: Tokenizer) -> None:
    batch = batch_of([1, 2, 3], [1, 1, 1])
    assert TagWeights(tokenizer, 1.0)(batch) is batch and batch.weights_BT is None


def test_sft_divides_by_tokens_not_by_weights_and_holds_out_unweighted(
    ground: Path, tmp_path: Path, recipe: Make, run: Callable[..., dict[str, Any]]
) -> None:
    """The first step's loss, written out: sum of weight * nats over the number of trained tokens, as MiniMind-R1."""
    rows = [
        {"messages": [
            {"role": "user", "content": f"the cat {i}"},
            {"role": "assistant", "reasoning_content": "a mat " * (i % 4), "content": "<answer>red</answer>"},
        ]}
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "thoughts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train.seq_len": 64, "train.tag_weight": 10.0, "log.every": 1, "train.steps": 1, "train.eval_every": 1}
    values = recipe(stage="sft", data=str(tmp_path / "thoughts.jsonl"), **changes)
    parsed, tokenizer = build_recipe(values), load_tokenizer(ground / "tok")
    stage = SFT(
        SFT.open(parsed, tokenizer, Path(values["cache"])), parsed, Place(torch.device("cpu"), World()), tokenizer
    )
    (batch,) = stage.fetch(0, 1)
    assert batch.weights_BT is not None and (batch.weights_BT == 10).sum() > 20
    model = load_model(ground / "model")
    logits = model(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), reduction="none")
    count = (batch.labels_BT != -100).sum()
    expected = (nats * batch.weights_BT.flatten()).sum() / count
    train, *_ = figures(run(values)["output"])
    assert train["loss"] == pytest.approx(expected.item(), rel=1e-5)
    plain = figures(
        run({**values, "train": {**values["train"], "tag_weight": 1.0}, "output": str(tmp_path / "b")})["output"]
    )
    assert plain[0]["loss"] == pytest.approx((nats.sum() / count).item(), rel=1e-5)
    # the same first weights: what is held out is measured without weights
    with torch.no_grad():
        assert stage.evaluate(model)["val_loss"] == pytest.approx(
            float(stage.loss(model, stage.val.batch(torch.arange(len(stage.val)).numpy()))[0])  # type: ignore[union-attr]
            / stage.val.trained_tokens,  # type: ignore[union-attr]
            rel=1e-5,
        )
