"""Advantages: TRL's figures, GAE against a loop, packed like alone, and groups that cannot teach."""

from __future__ import annotations

import json
import math

import pytest
import torch
from packed_layout import FIXTURES, Layout

from groundup.objectives.advantages import (
    gae,
    gae_packed,
    group_advantages,
    leave_one_out,
    overlong_penalty,
    token_rewards,
    uniform,
    whiten,
)

FIGURES = json.loads((FIXTURES / "policy.json").read_text(encoding="utf-8"))
NAN = math.nan
REWARDS = torch.tensor([[NAN if r is None else r for r in group] for group in FIGURES["rewards"]]).flatten()
GROUPS = torch.arange(5).repeat_interleave(4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_equal_trls(scale):
    torch.testing.assert_close(
        group_advantages(REWARDS, GROUPS, scale), torch.tensor(FIGURES["group_advantages"][scale]), atol=1e-6, rtol=1e-5
    )


def test_leave_one_out_equals_trls():
    torch.testing.assert_close(
        leave_one_out(REWARDS, GROUPS), torch.tensor(FIGURES["leave_one_out"]), atol=1e-6, rtol=1e-5
    )


def test_by_hand():
    rewards, groups = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([4, 4, 4])
    assert leave_one_out(rewards, groups).tolist() == pytest.approx([0.0, -1.5, 1.5])
    assert group_advantages(rewards, groups).tolist() == pytest.approx([0, -1 / 1.0001, 1 / 1.0001])  # std 1, unbiased
    assert group_advantages(rewards, groups, eps=1.0).tolist() == pytest.approx([0, -0.5, 0.5])


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out])
def test_the_order_of_the_completions_does_not_matter(advantages):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = advantages(REWARDS[order], GROUPS[order] * 17 - 3)  # and groups may have any numbers
    torch.testing.assert_close(shuffled, advantages(REWARDS, GROUPS)[order])


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out])
def test_a_reward_that_is_missing_changes_no_other(advantages):
    with_nan = advantages(torch.tensor([1.0, NAN, 0.0, 0.5]), torch.zeros(4, dtype=torch.long))
    without = advantages(torch.tensor([1.0, 0.0, 0.5]), torch.zeros(3, dtype=torch.long))
    assert with_nan[1] == 0
    torch.testing.assert_close(with_nan[[0, 2, 3]], without)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_that_cannot_teach_have_exactly_no_advantage(scale):
    rewards = torch.tensor([0.1] * 10 + [5.0] + [NAN, 2.0] + [NAN, NAN] + [1.0, 3.0], dtype=torch.float64)
    groups = torch.tensor([0] * 10 + [1] + [2, 2] + [3, 3] + [4, 4])
    assert sum([0.1] * 10) / 10 != 0.1  # a mean that rounding moves
    dull = uniform(rewards, groups)
    assert dull.tolist() == [True] * 15 + [False] * 2
    advantages = group_advantages(rewards, groups, scale)
    assert not advantages[dull].any() and advantages[~dull].all()
    assert not leave_one_out(rewards, groups)[dull].any()


def test_a_single_completion_and_no_reward_at_all():
    one = torch.zeros(1, dtype=torch.long)
    for scale in ("group", "batch", "none"):
        assert group_advantages(torch.tensor([3.0]), one, scale).tolist() == [0]
        assert group_advantages(torch.tensor([NAN]), one, scale).tolist() == [0]
        assert group_advantages(torch.zeros(0), one[:0], scale).tolist() == []
    assert leave_one_out(torch.tensor([3.0]), one).tolist() == [0]


def test_overlong_penalty_falls_in_the_buffer():
    lengths = torch.tensor([0, 80, 90, 95, 100, 120])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -0.75, -1, -1])
    assert overlong_penalty(lengths, 100, 0).tolist() == [0, 0, 0, 0, 0, -1]


LENGTHS = [9, 4, 7, 1, 6, 8]
LAYOUT = Layout(LENGTHS)
PPO = FIGURES["ppo"]


@pytest.mark.parametrize("case", PPO["gae"], ids=lambda case: f"{case['gamma']}-{case['lam']}")
def test_gae_equals_trls_and_the_loop(case):
    """One loop over one completion, all completions of packed rows at once, and TRL say the same."""
    gamma, lam, inputs = case["gamma"], case["lam"], FIGURES["inputs"]
    rewards, values = torch.tensor(inputs["rewards"]), torch.tensor(inputs["values"])
    advantages, returns = torch.tensor(case["advantages"]), torch.tensor(case["returns"])
    for i, length in enumerate(torch.tensor(PPO["mask"]).sum(1).tolist()):
        a, r = gae(rewards[i, :length], values[i, :length], gamma, lam)
        torch.testing.assert_close(a, advantages[i, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(r, returns[i, :length], atol=1e-5, rtol=1e-5)
    mask = LAYOUT.pack(PPO["mask"], 0)
    packed = gae_packed(LAYOUT.pack(rewards), LAYOUT.pack(values), LAYOUT.doc_ids, mask, gamma, lam)
    for ours, theirs in zip(packed, (advantages, returns), strict=True):
        assert not ours[mask == 0].any()
        torch.testing.assert_close(LAYOUT.unpack(ours), theirs, atol=1e-5, rtol=1e-5)


def test_gae_of_long_completions_equals_the_loop():
    draw = torch.Generator().manual_seed(3)
    lengths = [1000, 1, 37, 961]
    layout = Layout(lengths, rows=2, width=1100)
    rewards, values = torch.randn(4, 1000, generator=draw), torch.randn(4, 1000, generator=draw)
    mask = torch.ones(4, 1000, dtype=torch.long)
    ours, _ = gae_packed(
        layout.pack(rewards), layout.pack(values), layout.doc_ids, layout.pack(mask, 0), gamma=0.999, lam=0.97
    )
    for i, length in enumerate(lengths):
        loop, _ = gae(rewards[i, :length], values[i, :length], 0.999, 0.97)
        torch.testing.assert_close(layout.unpack(ours, 1000)[i, :length], loop, atol=1e-4, rtol=1e-4)


def test_gae_passes_over_observations():
    """A tool's answer in the midst of a completion is no time that passed, and its values are not looked at."""
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0]])
    rewards = torch.tensor([[NAN, 0.5, -1.0, NAN, NAN, 0.25, 2.0, NAN]])
    values = torch.tensor([[NAN, 0.1, 0.2, NAN, NAN, 0.3, 0.4, NAN]])
    ours = gae_packed(rewards, values, torch.zeros(1, 8, dtype=torch.int32), mask, 0.9, 0.8)
    own = mask[0].bool()
    for packed, alone in zip(ours, gae(rewards[0, own], values[0, own], 0.9, 0.8), strict=True):
        torch.testing.assert_close(packed[0, own], alone)
        assert not packed[0, ~own].any()


def test_gae_where_nothing_is_masked_in():
    nothing = torch.zeros(2, 5)
    advantages, returns = gae_packed(nothing, nothing, nothing.int(), nothing, 1.0, 0.95)
    assert not advantages.any() and not returns.any() and advantages.shape == (2, 5)


def test_without_values_the_advantage_is_the_reward_to_come():
    rewards, zeros = torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0]]), torch.zeros(1, 5)
    doc_ids = torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32)
    assert gae_packed(rewards, zeros, doc_ids, torch.ones(1, 5), 1.0, 1.0)[0].tolist() == [[6, 5, 3, 30, 20]]


def test_the_score_lies_on_the_last_own_token():
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1, -1]], dtype=torch.int32)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 0]])
    penalties = torch.tensor([[NAN, 0.1, 0.2, NAN, 0.5, 0.5, NAN]])
    rewards = token_rewards(torch.tensor([2.0, 7.0]), penalties, doc_ids, mask)
    torch.testing.assert_close(rewards, torch.tensor([[0, -0.1, 1.8, 0, 0, 0, 0]]))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_trls(shift_mean):
    values, mask = torch.tensor(FIGURES["inputs"]["advantages_per_token"]), torch.tensor(PPO["mask"])
    ours = whiten(torch.where(mask.bool(), values, NAN), mask, shift_mean)
    torch.testing.assert_close(ours, torch.tensor(PPO[f"whiten_{shift_mean}"]), atol=1e-6, rtol=1e-5)


def test_whitening_over_ranks_equals_whitening_of_all():
    """Two ranks, the second of which has few tokens: each adds up its figures with those of the other."""
    draw = torch.Generator().manual_seed(1)
    values, mask = 5 + 3 * torch.randn(2, 50, generator=draw), torch.ones(2, 50)
    mask[1, 3:] = 0
    both = whiten(values, mask)
    mean = values[mask.bool()].double().mean()

    def sums(rank: int):
        other, calls = values[1 - rank][mask[1 - rank].bool()].double(), []

        def add(figures: list[float]) -> list[float]:
            calls.append(figures)
            more = [other.sum(), len(other)] if len(calls) == 1 else [(other - mean).square().sum()]
            return [a + float(b) for a, b in zip(figures, more, strict=True)]

        return add

    for rank in (0, 1):
        torch.testing.assert_close(whiten(values[rank], mask[rank], sums=sums(rank)), both[rank])


def test_whitening_of_nothing_and_of_one():
    values = torch.tensor([4.0, NAN])
    assert whiten(values, torch.tensor([0, 0])).tolist() == [0, 0]
    assert whiten(values, torch.tensor([1, 0])).tolist() == [0, 0]
    assert whiten(torch.full((3,), 0.1), torch.ones(3)).abs().max() < 1e-3
