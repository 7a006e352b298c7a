"""Losses of pairs and of single answers against TRL's trainers, and where their values are known by heart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.objectives.preference import Answers, log_odds, pair_losses, rewards, scores, unpaired_losses

FIXTURE = Path(__file__).parent / "fixtures" / "preference.json"
FIGURES: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
NOT_OURS = ("value", "metrics")


def answers(found: dict[str, Any]) -> Answers:
    return Answers(*(torch.tensor(found[name], dtype=torch.float32) for name in ("logps", "reference", "tokens")))


def named(case: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in case.items() if key not in NOT_OURS)


def told(case: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in case.items() if key not in NOT_OURS}


@pytest.mark.parametrize("case", FIGURES["pairs"], ids=named)
def test_losses_and_rewards_of_pairs_are_those_of_trl(case: dict[str, Any]) -> None:
    chosen, rejected = answers(FIGURES["chosen"]), answers(FIGURES["rejected"])
    settings = told(case)
    loss = settings.pop("loss")
    losses = pair_losses(loss, chosen, rejected, **settings)
    assert losses.shape == (4,) and losses.mean().item() == pytest.approx(case["value"], rel=1e-5)
    good, poor = (rewards(loss, side, case["beta"]) for side in (chosen, rejected))
    metrics = {
        "rewards/chosen": good, "rewards/rejected": poor, "rewards/accuracies": (good > poor).float(),
        "rewards/margins": good - poor, "logps/chosen": chosen.logps_D, "logps/rejected": rejected.logps_D,
    }  # fmt: skip
    assert {name: value.mean().item() for name, value in metrics.items()} == pytest.approx(case["metrics"], rel=1e-5)


@pytest.mark.parametrize("case", FIGURES["free"], ids=named)
def test_losses_without_a_reference_are_those_of_trl(case: dict[str, Any]) -> None:
    sides = [answers(FIGURES[side] | {"reference": [0.0] * 4}) for side in ("chosen", "rejected")]
    settings = told(case)
    losses = pair_losses(settings.pop("loss"), *sides, **settings)
    if case["loss"] == "orpo":  # TRL adds the cross entropy elsewhere, over prompts, too
        losses = losses + sides[0].means
    assert losses.mean().item() == pytest.approx(case["value"], rel=1e-5)


@pytest.mark.parametrize("case", FIGURES["unpaired"]["losses"], ids=named)
def test_losses_of_single_answers_are_those_of_trl(case: dict[str, Any]) -> None:
    found = FIGURES["unpaired"]
    ratios = torch.tensor(found["kl_logps"]) - torch.tensor(found["kl_reference"])
    baseline = max(0.0, ratios.mean().item()) if case["loss"] == "kto" else 0.0
    assert baseline == pytest.approx(case["metrics"]["kl"], rel=1e-5)
    settings = told(case)
    loss, judged, wanted = settings.pop("loss"), answers(found), torch.tensor(found["wanted"])
    losses = unpaired_losses(judged, wanted, settings.pop("beta"), baseline, **settings)
    assert losses.mean().item() == pytest.approx(case["value"], rel=1e-5)
    assert rewards(loss, judged, case["beta"])[wanted].mean() == pytest.approx(
        case["metrics"]["rewards/chosen"], rel=1e-5
    )


def test_the_fixture_can_tell_losses_apart() -> None:
    values = [case["value"] for case in FIGURES["pairs"] + FIGURES["free"]]
    assert len({round(value, 5) for value in values}) == len(values) - 2  # alpha 1 is the reverse KL again, twice
    assert FIGURES["unpaired"]["losses"][0]["metrics"]["kl"] > 0


def even(tokens: int = 5) -> Answers:
    """Answers that the policy says as its reference does."""
    logps = torch.tensor([-3.0, -40.25, -700.125])
    return Answers(logps, logps.clone(), torch.full((3,), float(tokens)))


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ("dpo", math.log(2)),
        ("robust", math.log(2)),
        ("ipo", 25.0),
        ("hinge", 1.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
    ],
)
def test_a_policy_that_is_its_reference_has_the_value_of_indifference(loss: Any, value: float) -> None:
    other = Answers(even().logps_D.flip(0), even().reference_D.flip(0), even(9).tokens_D)
    losses = pair_losses(loss, even(), other, 0.1, label_smoothing=0.1 if loss == "robust" else 0.0)
    assert losses.tolist() == pytest.approx([value] * 3, abs=1e-6)
    if loss == "dpo":
        assert losses.tolist() == [torch.log(torch.tensor(2.0)).item()] * 3, "exactly"


def test_ipo_sums_or_takes_means() -> None:
    """OpenRLHF sums log ratios, TRL divides by the answers' tokens; with answers of one token both are the same."""
    chosen, rejected = (
        Answers(torch.tensor([a]), torch.tensor([b]), torch.tensor([4.0])) for a, b in ((-2.0, -3.0), (-5.0, -4.0))
    )
    assert pair_losses("ipo", chosen, rejected, 0.5, average=False).item() == pytest.approx((2 - 1) ** 2)
    assert pair_losses("ipo", chosen, rejected, 0.5).item() == pytest.approx((0.5 - 1) ** 2)


def test_smoothing_is_conservative_or_unbiased() -> None:
    """The robust loss of flipped labels is, on average, the plain one of clean labels; the conservative one is not."""
    chosen, rejected = answers(FIGURES["chosen"]), answers(FIGURES["rejected"])
    clean = pair_losses("dpo", chosen, rejected, 0.3)
    share = 0.2
    for loss, unbiased in (("robust", True), ("dpo", False)):
        kept, flipped = (
            pair_losses(loss, *sides, 0.3, label_smoothing=share) for sides in ((chosen, rejected), (rejected, chosen))
        )  # type: ignore[arg-type]
        mean = (1 - share) * kept + share * flipped
        assert torch.allclose(mean, clean, atol=1e-6) == unbiased


def slope(losses: Callable[[Answers, Answers], torch.Tensor], side: int) -> float:
    """Of the loss in the log probability of one side's answer, where policy and reference agree."""
    logps = [torch.tensor([-12.0], requires_grad=True), torch.tensor([-15.0], requires_grad=True)]
    both = [Answers(x, x.detach(), torch.tensor([6.0])) for x in logps]
    losses(*both).sum().backward()
    grad = logps[side].grad
    return 0.0 if grad is None else float(grad)


@pytest.mark.parametrize("loss", ["dpo", "robust", "ipo", "hinge", "simpo", "orpo", "apo_zero"])
def test_chosen_answers_go_up_and_rejected_ones_down(loss: Any) -> None:
    assert slope(lambda a, b: pair_losses(loss, a, b, 0.1, margin=0.5), 0) < 0
    assert slope(lambda a, b: pair_losses(loss, a, b, 0.1, margin=0.5), 1) > 0


def test_apo_down_pushes_the_rejected_one_further_than_the_chosen_one() -> None:
    policy = torch.tensor([-12.0, -15.0], requires_grad=True)
    reference = torch.tensor([-15.0, -15.0])  # the chosen one has come up already
    both = [Answers(policy[i : i + 1], reference[i : i + 1], torch.tensor([6.0])) for i in (0, 1)]
    pair_losses("apo_down", *both, 0.5).sum().backward()
    assert policy.grad is not None and policy.grad[1] > 0
    even_sides = (
        slope(lambda a, b: pair_losses("apo_down", a, b, 0.5), 0),
        slope(lambda a, b: pair_losses("apo_down", a, b, 0.5), 1),
    )
    assert even_sides[0] == pytest.approx(0, abs=1e-7) and even_sides[1] > 0


@pytest.mark.parametrize("logps", [0.0, -1e-9, -1e4, -3e38])
def test_no_answer_is_too_sure_or_too_unlikely(logps: float) -> None:
    """Certain answers have no finite odds, and absurd ones overflow exp: losses and gradients stay numbers."""
    for loss in ("dpo", "robust", "ipo", "hinge", "simpo", "orpo", "apo_zero", "apo_down"):
        x = torch.tensor([logps], requires_grad=True)
        side = Answers(x, torch.tensor([-2.0]), torch.tensor([1.0]))
        other = Answers(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([3.0]))
        kinds = ("reverse_kl", "js_divergence", "forward_kl", "alpha_divergence") if loss == "dpo" else ("reverse_kl",)
        for kind in kinds:
            for sides in ((side, other), (other, side)):
                if loss == "ipo" and logps == -3e38:
                    continue  # its square is no fp32 number, nor anything else's
                x.grad = None
                losses = pair_losses(loss, *sides, 0.1, margin=0.5, f_divergence_type=kind)  # type: ignore[arg-type]
                losses.sum().backward()
                assert losses.isfinite().all() and x.grad is not None and x.grad.isfinite().all(), (loss, kind)


def test_log_odds_against_float64() -> None:
    means = -torch.logspace(-6, 2, 200)
    wide = means.double()
    exact = wide - torch.log(-torch.expm1(wide))
    torch.testing.assert_close(log_odds(means).double(), exact, rtol=2e-6, atol=1e-6)


def test_scores_meet_where_divergences_do() -> None:
    ratios = torch.linspace(-3, 3, 13)
    near = scores(ratios, "alpha_divergence", 1 + 1e-4)
    torch.testing.assert_close(near, scores(ratios, "reverse_kl", 0.5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores(ratios, "alpha_divergence", 0.0), scores(ratios, "forward_kl", 0.5))


def test_trl_itself_still_says_the_same() -> None:
    pytest.importorskip("trl", reason="the live oracle: TRL's own trainers")
    from trl_preference import figures

    live = figures()
    for kind in ("pairs", "free"):
        for ours, theirs in zip(FIGURES[kind], live[kind], strict=True):
            assert theirs["value"] == pytest.approx(ours["value"], rel=1e-4), named(ours)
    for ours, theirs in zip(FIGURES["unpaired"]["losses"], live["unpaired"]["losses"], strict=True):
        assert theirs["value"] == pytest.approx(ours["value"], rel=1e-4), named(ours)
