"""Losses of scores against TRL's RewardTrainer and DeepSpeed-Chat's loop, and what a figure says by heart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_reward import documents, scored

from groundup.data.batch import Batch
from groundup.data.documents import Document, pack_documents
from groundup.objectives.reward import (
    calibration_error,
    from_divergence,
    judged,
    pairwise,
    reliability,
    share_won,
    side_by_side,
)
from groundup.train.reward import ends

FIXTURE = Path(__file__).parent / "fixtures" / "reward.json"
FIGURES: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))


def packed(pairs: list[tuple[list[int], list[int]]], seq_len: int = 24) -> Batch:
    sides = [side for pair in pairs for side in pair]
    made = [Document(torch.tensor(ids).numpy(), torch.full((len(ids),), -100).numpy()) for ids in sides]
    return pack_documents(made, seq_len, 0, together=2)


@pytest.mark.parametrize("case", FIGURES["cases"], ids=lambda case: f"{case['margins'][1]}-{case['centring']}")
def test_pairs_lose_what_trl_says(case: dict[str, Any]) -> None:
    chosen, rejected = torch.tensor(FIGURES["chosen"]), torch.tensor(FIGURES["rejected"])
    total, count = pairwise(chosen, rejected, torch.tensor(case["margins"]), case["centring"])
    assert count == 4 and (total / count).item() == pytest.approx(case["loss"], rel=1e-5)
    told = case["metrics"]
    assert share_won(chosen, rejected).item() / 4 == told["accuracy"]
    assert (chosen - rejected).mean().item() == pytest.approx(told["margin"], rel=1e-5)


def test_packed_pairs_have_the_scores_that_trl_computes_padded() -> None:
    """The same weights, which TRL read from our files: last real token, last norm once."""
    pairs = list(zip(*documents(), strict=True))
    batch = packed(pairs)
    assert 1 < len(batch.input_ids_BT) < 4, "several pairs must share a row"
    with torch.no_grad():
        scores_BT = scored().scores_BT(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
    found = torch.stack(ends(scores_BT, batch), 1).tolist()
    wanted = list(zip(FIGURES["chosen"], FIGURES["rejected"], strict=True))
    for pair in wanted:  # packing sorts them
        assert min(abs(a - pair[0]) + abs(b - pair[1]) for a, b in found) < 1e-4


def test_the_fixture_is_what_trl_says_today() -> None:
    pytest.importorskip("trl", reason="the reference")
    from trl_reward import figures

    now = figures()
    assert now["chosen"] == pytest.approx(FIGURES["chosen"], abs=1e-4)
    for case, stored in zip(now["cases"], FIGURES["cases"], strict=True):
        assert case["loss"] == pytest.approx(stored["loss"], rel=1e-4)


def test_equal_scores_cost_ln_2_and_a_lead_less() -> None:
    zero = torch.zeros(1)
    assert pairwise(zero, zero)[0].item() == pytest.approx(math.log(2))
    assert pairwise(zero + 2, zero)[0] < pairwise(zero + 1, zero)[0] < math.log(2)
    assert pairwise(zero + 1, zero, margin=1.0)[0].item() == pytest.approx(math.log(2))
    assert pairwise(zero + 3, zero + 3, centring=0.5)[0].item() == pytest.approx(math.log(2) + 0.5 * 36)
    assert pairwise(zero + 900, zero - 900)[0].item() == 0 and torch.isfinite(pairwise(zero - 900, zero + 900)[0])


def test_a_pair_pulls_its_scores_apart_by_the_chance_of_the_wrong_winner() -> None:
    chosen, rejected = torch.tensor([0.3], requires_grad=True), torch.tensor([0.8], requires_grad=True)
    pairwise(chosen, rejected)[0].backward()
    wrong = torch.sigmoid(torch.tensor(0.5)).item()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-wrong) and rejected.grad.item() == pytest.approx(wrong)


def deepspeed_chat(chosen: list[int], rejected: list[int], c_scores: Tensor, r_scores: Tensor) -> Tensor:
    """reward_model.py of DeepSpeed-Chat for one pair: both sides filled up to one length, which it cuts off again."""
    width, pad = max(len(chosen), len(rejected)) + 3, 0

    def filled(ids: list[int], scores: Tensor) -> tuple[Tensor, Tensor]:
        after = width - len(ids)
        return torch.tensor(ids + [pad] * after), torch.cat([scores, scores[-1:].expand(after)])

    (c_ids, c_all), (r_ids, r_all) = filled(chosen, c_scores), filled(rejected, r_scores)
    c_ind, r_ind = ((ids == pad).nonzero()[0].item() for ids in (c_ids, r_ids))
    end, start = max(c_ind, r_ind), (c_ids != r_ids).nonzero()[0].item()
    return -torch.nn.functional.logsigmoid(c_all[start:end] - r_all[start:end]).mean()


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_from_the_divergence_is_deepspeed_chats(seed: int) -> None:
    """Padding scored as the last real token, which ours holds; theirs would read what stands at padding."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> list[int]:
        return torch.randint(1, 90, (count,), generator=generator).tolist()

    pairs = []
    for _ in range(5):
        begin = some(int(torch.randint(1, 4, (1,), generator=generator)))
        lengths = torch.randint(1, 6, (2,), generator=generator).tolist()
        one, other = (begin + some(n) for n in lengths)
        pairs.append((one, other if one != other else [*other, 91]))
    pairs.append(([1, 2, 3], [1, 2, 3, 3, 5]))  # one side the beginning of the other
    batch = packed(pairs)
    scores_BT = torch.randn(batch.input_ids_BT.shape, generator=generator)
    total, count = from_divergence(scores_BT, batch.input_ids_BT, batch.doc_ids_BT)
    chosen_PL, rejected_PL, _ = side_by_side(batch.input_ids_BT, batch.doc_ids_BT)
    wanted = torch.zeros(())
    flat_ids, flat = batch.input_ids_BT.flatten(), scores_BT.flatten()
    for c, r in zip(chosen_PL, rejected_PL, strict=True):
        c, r = c.unique(), r.unique()
        wanted += deepspeed_chat(flat_ids[c].tolist(), flat_ids[r].tolist(), flat[c], flat[r])
    assert count == 6 and total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_both_say_before_they_differ_has_no_part_in_the_loss() -> None:
    batch = packed([([5, 6, 7, 8], [5, 6, 9])])
    scores_BT = torch.zeros(batch.input_ids_BT.shape, requires_grad=True)
    from_divergence(scores_BT, batch.input_ids_BT, batch.doc_ids_BT)[0].backward()
    assert scores_BT.grad is not None
    moved = (scores_BT.grad.flatten() != 0).nonzero().flatten().tolist()
    assert moved == [2, 3, 6]


def test_judgements_are_a_cross_entropy() -> None:
    scores, right = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([True, False, True])
    total, count = judged(scores, right)
    probabilities = torch.sigmoid(scores)
    wanted = -(probabilities[0].log() + (1 - probabilities[1]).log() + probabilities[2].log())
    assert count == 3 and total.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_draw_is_half_won() -> None:
    assert share_won(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 3.0])) == 1.5


def test_calibration() -> None:
    """70 % sure and right 7 times of 10: no error. Sure beyond doubt and right half the time: a half."""
    honest = reliability(torch.full((10,), 0.7), torch.tensor([True] * 7 + [False] * 3))
    assert calibration_error(honest) == pytest.approx(0, abs=1e-6)
    boastful = reliability(torch.full((10,), 1.0), torch.tensor([True] * 5 + [False] * 5))
    assert calibration_error(boastful) == pytest.approx(0.5)
    mirrored = reliability(torch.full((10,), 0.3), torch.tensor([False] * 7 + [True] * 3))
    assert calibration_error(mirrored) == pytest.approx(0, abs=1e-6), "the likelier outcome is what counts"
    both = calibration_error(honest + boastful)
    assert both == pytest.approx(0.25), "sums of batches add up"


def test_calibration_is_a_mean_over_bins_weighed_by_how_many_they_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    probability, happened = torch.rand(500, generator=generator), torch.rand(500, generator=generator) < 0.5
    sure = torch.maximum(probability, 1 - probability).double()
    right = (probability >= 0.5) == happened
    error = 0.0
    for low in torch.arange(0.5, 1.0, 0.05).tolist():
        inside = (sure >= low) & (sure < low + 0.05)
        if inside.any():
            error += abs(float(sure[inside].sum() - right[inside].sum())) / 500
    assert calibration_error(reliability(probability, happened)) == pytest.approx(error, abs=2e-3)
