"""Minutes become a plan: everything follows, nothing outgrows the time."""

from __future__ import annotations

import pytest
import torch

from groundup.errors import UserError
from groundup.model.presets import scaled
from groundup.plan import budget
from groundup.plan.budget import measure_step, plan_quickstart

PEAK = 1e11


@pytest.mark.parametrize("minutes", [0.2, 1, 10, 60, 600])
def test_the_stages_fill_the_time_and_no_more(minutes: float) -> None:
    plan = plan_quickstart(minutes, peak=PEAK)
    step = plan.batch_size * plan.seq_len
    seconds = 0.0
    for stage in (plan.pretrain, plan.sft):
        assert stage.tokens == stage.steps * step
        assert stage.seconds == pytest.approx(stage.tokens / plan.tokens_per_second)
        seconds += stage.seconds
    assert seconds <= 60 * minutes
    assert seconds > 60 * minutes * budget.SAVING - 2.1 * step / plan.tokens_per_second


def test_more_time_or_a_faster_machine_never_makes_a_smaller_model() -> None:
    by_time = [plan_quickstart(m, peak=PEAK).depth for m in (1, 5, 20, 80, 320, 1280)]
    assert by_time == sorted(by_time)
    assert by_time[-1] > by_time[0]
    by_peak = [plan_quickstart(10, peak=p).depth for p in (1e10, 1e11, 1e12, 1e13, 1e14)]
    assert by_peak == sorted(by_peak)
    assert by_peak[-1] > by_peak[0]


def test_the_dial() -> None:
    plan = plan_quickstart(10, depth=6, vocab_size=1000, peak=PEAK)
    assert (plan.depth, plan.config) == (6, scaled(6, 1000))
    assert plan.pretrain.lr < plan_quickstart(10, depth=2, peak=PEAK).pretrain.lr


def test_the_machine_is_measured_once_and_believed() -> None:
    asked = []

    def rate(config, batch_size: int, seq_len: int) -> float:
        asked.append((config, batch_size, seq_len))
        return 5000.0

    plan = plan_quickstart(10, peak=PEAK, tokens_per_second=rate)
    assert asked == [(plan.config, plan.batch_size, plan.seq_len)]
    assert plan.pretrain.tokens + plan.sft.tokens <= 5000 * 600
    assert plan.tokens_per_second == 5000


def test_what_is_printed_and_reported_is_the_plan() -> None:
    plan = plan_quickstart(10, peak=PEAK)
    derived = plan.derived()
    assert derived["pretrain_tokens"] == plan.pretrain.tokens
    assert derived["parameters"] == plan.parameters
    text = "\n".join(plan.lines())
    assert f"{plan.sft.steps:,} steps" in text
    assert f"depth {plan.depth}" in text


def test_no_time_is_refused() -> None:
    with pytest.raises(UserError, match="--minutes: 0 is no budget"):
        plan_quickstart(0, peak=PEAK)
    with pytest.raises(UserError, match="depth=-1"):
        plan_quickstart(1, depth=-1, peak=PEAK)


def test_measure_step_runs_real_steps() -> None:
    before = torch.get_rng_state()
    config = scaled(1, 300)
    assert measure_step(config, 2, 32, device="cpu", seconds=0.0) > 0
    assert torch.equal(torch.get_rng_state(), before)
