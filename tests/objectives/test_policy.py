"""Policy losses: TRL's figures and gradients, one layout like another, one batch like its parts, and how far is far."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from packed_layout import FIXTURES, Layout

from groundup.objectives.policy import (
    KINDS,
    AdaptiveKL,
    explained_variance,
    importance_weights,
    kl,
    policy_count,
    policy_loss,
    value_loss,
)

FIGURES = json.loads((FIXTURES / "policy.json").read_text(encoding="utf-8"))
INPUTS, PPO = FIGURES["inputs"], FIGURES["ppo"]
LENGTHS = [9, 4, 7, 1, 6, 8]
LAYOUTS = [Layout(LENGTHS), Layout(LENGTHS, rows=6, width=11), Layout(LENGTHS, rows=1, width=60)]
LAYOUT = LAYOUTS[0]

# Our settings for each of TRL's in fixtures/make_policy.py. bnpo, with one micro-batch, is dapo's mean.
OURS = {
    "grpo": {"kind": "grpo"},
    "grpo_kl": {"kind": "grpo", "kl_coef": 0.4},
    "grpo_delta": {"kind": "grpo", "delta": 1.3},
    "grpo_importance": {"kind": "grpo", "with_importance": True},
    "dr_grpo": {"kind": "dr_grpo", "max_tokens": 12},
    "dr_grpo_kl": {"kind": "dr_grpo", "max_tokens": 12, "kl_coef": 0.4},
    "dapo": {"kind": "dapo", "clip_high": 0.28},
    "dapo_kl": {"kind": "dapo", "clip_high": 0.28, "kl_coef": 0.4, "with_importance": True},
    "dapo_entropy": {"kind": "dapo", "entropy_coef": 0.3},
    "bnpo": {"kind": "dapo"},
    "gspo": {"kind": "gspo", "clip_low": 0.03, "clip_high": 0.04},
    "cispo": {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.3},  # TRL's epsilon_high is the bound itself
}


def run(layout: Layout = LAYOUT, inputs=INPUTS, with_importance: bool = False, advantages=None, **settings):
    """policy_loss of the fixture's completions in a layout: (sum / count, gradient as [6, 9], metrics / count)."""
    logprobs = layout.pack(inputs["logprobs"]).requires_grad_()
    total, count, metrics = policy_loss(
        logprobs,
        layout.pack(inputs["old"]),
        layout.pack(inputs["advantages"] if advantages is None else advantages),
        layout.pack(inputs["mask"]),
        layout.doc_ids,
        importance_BT=layout.pack(inputs["importance"]) if with_importance else None,
        reference_BT=layout.pack(inputs["reference"]) if "kl_coef" in settings else None,
        entropy_BT=layout.pack(inputs["entropy"]) if "entropy_coef" in settings else None,
        **settings,
    )
    (total / count).backward()
    return total / count, layout.unpack(logprobs.grad), {name: value / count for name, value in metrics.items()}


@pytest.mark.parametrize("name", FIGURES["losses"])
def test_losses_and_gradients_equal_trls(name):
    theirs = FIGURES["losses"][name]
    loss, gradient, metrics = run(**OURS[name])
    assert loss.item() == pytest.approx(theirs["loss"], abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(theirs["gradient"]), atol=1e-6, rtol=1e-5)
    if OURS[name]["kind"] == "dapo":  # its metrics are means over tokens, as TRL's are
        assert metrics["clip_fraction_low"].item() == pytest.approx(theirs["metrics"]["clip_ratio/low_mean"])
        assert metrics["clip_fraction_high"].item() == pytest.approx(theirs["metrics"]["clip_ratio/high_mean"])
        for ours in set(metrics) & {"kl", "entropy"}:
            assert metrics[ours].item() == pytest.approx(theirs["metrics"][ours], abs=1e-5)


def test_the_fixture_has_something_to_clip():
    """Otherwise the test above would show little."""
    for name in ("grpo", "gspo"):
        metrics = FIGURES["losses"][name]["metrics"]
        assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert FIGURES["losses"]["cispo"]["metrics"]["cispo_clip_ratio"] > 0
    assert FIGURES["losses"]["grpo_delta"]["loss"] != FIGURES["losses"]["grpo"]["loss"]


@pytest.mark.parametrize("name", FIGURES["losses"])
def test_live_trl_still_says_so(name):
    pytest.importorskip("trl", reason="the reference of these losses")
    spec = importlib.util.spec_from_file_location("make_policy", FIXTURES / "make_policy.py")
    make_policy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_policy)
    theirs = make_policy.trl_loss(INPUTS, **make_policy.LOSSES[name])
    loss, gradient, _ = run(**OURS[name])
    assert loss.item() == pytest.approx(theirs["loss"], abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(theirs["gradient"]), atol=1e-6, rtol=1e-5)


def test_ppos_loss_equals_trls():
    inputs = {**INPUTS, "mask": PPO["mask"]}
    loss, gradient, metrics = run(inputs=inputs, advantages=INPUTS["advantages_per_token"], kind="ppo")
    assert loss.item() == pytest.approx(PPO["pg_loss"], abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(PPO["logprobs_gradient"]), atol=1e-6, rtol=1e-5)
    clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert clipped.item() == pytest.approx(PPO["pg_clipfrac"])


def test_value_loss_equals_trls():
    mask, values = LAYOUT.pack(PPO["mask"]), LAYOUT.pack(INPUTS["values"]).requires_grad_()
    total, count, metrics = value_loss(values, LAYOUT.pack(INPUTS["old_values"]), LAYOUT.pack(INPUTS["returns"]), mask)
    (total / count).backward()
    assert (total / count).item() == pytest.approx(PPO["vf_loss"], abs=1e-6)
    assert (metrics["value_clip_fraction"] / count).item() == pytest.approx(PPO["vf_clipfrac"])
    torch.testing.assert_close(LAYOUT.unpack(values.grad), torch.tensor(PPO["values_gradient"]), atol=1e-6, rtol=1e-5)


def test_value_loss_without_clipping_is_half_the_squared_error():
    values, mask = torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[1, 1, 0]])
    total, count, metrics = value_loss(values, torch.zeros(1, 3), torch.zeros(1, 3), mask, clip=None)
    assert (total.item(), count.item(), metrics["value_clip_fraction"].item()) == (2.5, 2, 0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_equals_trls(kind):
    ours = kl(torch.tensor(INPUTS["logprobs"]), torch.tensor(INPUTS["reference"]), kind)
    torch.testing.assert_close(ours, torch.tensor(PPO[kind]), atol=1e-6, rtol=1e-5)


def test_kl_estimators_estimate_the_kl():
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(0.5 * torch.randn(20, generator=draw), 0) for _ in range(2))
    true = (p.exp() * (p - q)).sum().item()
    at = {kind: kl(p, q, kind) for kind in ("k1", "k2", "k3")}  # over all tokens at once: the exact expectation
    assert (p.exp() * at["k1"]).sum().item() == pytest.approx(true, abs=1e-6)
    assert (p.exp() * at["k3"]).sum().item() == pytest.approx(true, abs=1e-6)
    assert (p.exp() * at["k2"]).sum().item() == pytest.approx(true, rel=0.2)
    assert at["k1"].min() < 0 <= at["k3"].min()
    with pytest.raises(ValueError, match="k4"):
        kl(p, q, "k4")


SETTINGS = {"kl_coef": 0.1, "entropy_coef": 0.01, "with_importance": True, "max_tokens": 12}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_one_a_row(kind):
    expected = run(LAYOUTS[0], kind=kind, **SETTINGS)
    for layout in LAYOUTS[1:]:
        loss, gradient, metrics = run(layout, kind=kind, **SETTINGS)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(gradient, expected[1])
        torch.testing.assert_close(metrics, expected[2])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_add_up_to_it(kind):
    """Sums and counts of micro-batches, however unequal, give the loss of the whole: nothing is a mean of means."""
    layout = LAYOUTS[1]
    tensors = [layout.pack(INPUTS[name]) for name in ("logprobs", "old", "advantages", "mask")]
    total, count, metrics = policy_loss(*tensors, layout.doc_ids, kind, max_tokens=12)
    assert count == policy_count(tensors[3], layout.doc_ids, kind)
    parts = [
        policy_loss(*(x[rows] for x in tensors), layout.doc_ids[rows], kind, max_tokens=12)
        for rows in (slice(0, 1), slice(1, 5), slice(5, 6))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), total)
    assert sum(part[1] for part in parts) == count
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[2][name] for part in parts), value)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_masked_in_is_no_loss(kind):
    logprobs, empty = torch.full((2, 5), math.nan).requires_grad_(), torch.zeros(2, 5)
    total, count, metrics = policy_loss(logprobs, None, empty, empty, empty.int(), kind, max_tokens=4)
    total.backward()
    assert total == 0 and count == 0 and not logprobs.grad.any() and not any(metrics.values())


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "gspo"])
def test_a_completion_without_own_tokens_is_not_counted(kind):
    """Truncated and masked out: as if it were not there."""
    mask = [[0] * 9, *INPUTS["mask"][1:]]
    layout = Layout(LENGTHS[1:])
    rest = {name: values[1:] for name, values in INPUTS.items()}
    loss, gradient, _ = run(inputs={**INPUTS, "mask": mask}, kind=kind, max_tokens=12)
    alone, alone_gradient, _ = run(layout, rest, kind=kind, max_tokens=12)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(gradient[1:], alone_gradient)
    assert not gradient[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_observations_get_no_gradient_and_the_stop_token_does(kind):
    _, gradient, _ = run(kind=kind, clip_low=0.9, clip_high=9.0, **SETTINGS)
    assert not gradient[0, 3:5].any()  # what a tool answered
    assert gradient[0, 8] != 0 and gradient[3, 0] != 0  # the last token of a completion, even of length 1


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_very_same_weights_all_are_reinforce(kind):
    """Ratio 1: the gradient is -A over the count, whatever the kind, and nothing is clipped."""
    total, count, metrics = run_on_policy(kind)
    mask, advantages = torch.tensor(INPUTS["mask"]), torch.tensor(INPUTS["advantages"])[:, None]
    over = {"token": mask.sum(), "sequence": 6 * mask.sum(1, keepdim=True), "fixed": 6 * 12}[KINDS[kind].mean]
    torch.testing.assert_close(total, -advantages * mask / over)
    assert float(metrics["ratio"] / count) == pytest.approx(1) and metrics["approx_kl"] == 0
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0


def run_on_policy(kind):
    logprobs = LAYOUT.pack(INPUTS["logprobs"]).requires_grad_()
    mask, advantages = LAYOUT.pack(INPUTS["mask"]), LAYOUT.pack(INPUTS["advantages"])
    total, count, metrics = policy_loss(logprobs, None, advantages, mask, LAYOUT.doc_ids, kind, max_tokens=12)
    (total / count).backward()
    return LAYOUT.unpack(logprobs.grad), count, metrics


def test_kinds_differ_in_what_a_long_completion_weighs():
    """Two completions of 1 and 9 tokens: grpo gives each half, dapo a tenth and nine tenths, dr_grpo by max_tokens."""
    layout = Layout([1, 9])
    ones = torch.ones(2, 9)

    def weights(kind: str) -> list[float]:
        logprobs = layout.pack(ones).requires_grad_()
        tensors = layout.pack(ones), layout.pack(ones), layout.pack(ones, 0)
        total, count, _ = policy_loss(logprobs, *tensors, layout.doc_ids, kind, max_tokens=20)
        (total / count).backward()
        return [round(-x, 6) for x in layout.unpack(logprobs.grad).sum(1).tolist()]

    assert weights("grpo") == [0.5, 0.5]
    assert weights("dapo") == [0.1, 0.9]
    assert weights("dr_grpo") == [0.025, 0.225]


def test_dr_grpo_wants_max_tokens():
    with pytest.raises(ValueError, match="max_tokens"):
        run(kind="dr_grpo")


def test_clipping_by_hand():
    """Ratios 1/2 and 2: a good token that grew and a bad one that shrank are left alone, the others still move."""
    half = math.log(2)
    logprobs = torch.tensor([[half, half, -half, -half]], requires_grad=True)
    zeros, advantages = torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    total, _, metrics = policy_loss(logprobs, zeros, advantages, torch.ones(1, 4), zeros.int(), "ppo")
    total.backward()
    assert logprobs.grad.tolist() == [[0.0, 2.0, -0.5, 0.0]]
    assert (metrics["clip_fraction_high"].item(), metrics["clip_fraction_low"].item()) == (1, 1)
    logprobs.grad = None
    policy_loss(logprobs, zeros, advantages, torch.ones(1, 4), zeros.int(), "cispo", 1.0, 0.2)[0].backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([-1.2, 1.2, -0.5, 0.5])  # all still move


def test_absurd_ratios_stay_finite():
    logprobs = torch.tensor([[0.0, -500.0]], requires_grad=True)
    old, ones = torch.tensor([[-500.0, 0.0]]), torch.ones(1, 2)
    for kind in KINDS:
        total, _, metrics = policy_loss(
            logprobs, old, -ones, ones, ones.int(), kind, max_tokens=2, reference_BT=old, kl_coef=0.1
        )
        (grad,) = torch.autograd.grad(total, logprobs)
        assert total.isfinite() and grad.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())


def test_half_precision_logprobs_are_reckoned_in_fp32():
    logprobs, ones = torch.full((1, 4), -0.01, dtype=torch.bfloat16), torch.ones(1, 4)
    total, _, _ = policy_loss(logprobs, None, ones.bfloat16(), ones, ones.int(), "dapo")
    assert total.dtype == torch.float32


@pytest.mark.parametrize("over", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights(level, over):
    draw = torch.Generator().manual_seed(5)
    mask, trainer = torch.tensor(INPUTS["mask"]), torch.tensor(INPUTS["logprobs"])
    engine = trainer + 0.4 * torch.randn(6, 9, generator=draw)
    expected = (trainer - engine) * mask
    expected = (expected if level == "token" else expected.sum(1, keepdim=True).expand(6, 9)).exp()
    above = expected > 1.5
    assert above.any() and not above.all()
    expected = torch.where(above, 1.5 if over == "truncate" else 0.0, expected) * mask
    ours = importance_weights(
        LAYOUT.pack(trainer), LAYOUT.pack(engine), LAYOUT.pack(mask), LAYOUT.doc_ids, 1.5, level, over
    )
    torch.testing.assert_close(LAYOUT.unpack(ours) * mask, expected)


def test_adaptive_kl_moves_beta_towards_the_target():
    above, below, far = (AdaptiveKL(0.1, target=6.0, horizon=1000) for _ in range(3))
    assert above.update(6.6, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert below.update(5.4, 100) == pytest.approx(0.1 * (1 - 0.1 * 0.1))
    assert far.update(600.0, 100) == far.beta == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # an error counts 20 % at most
    assert AdaptiveKL(0.1, 6.0, 1000).update(6.0, 100) == 0.1


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, math.nan]]), torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1)  # a constant error varies not
    assert explained_variance(torch.zeros(1, 4), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(1, 4), mask) == 0
    assert explained_variance(returns, returns, torch.zeros(1, 4)) == 0
