"""The learning rate is a pure function of the step."""

from __future__ import annotations

import itertools
import math

import pytest

from groundup.config import OptimConfig
from groundup.optim import lr_factor, warmup_steps


def curve(steps: int = 100, **settings: object) -> list[float]:
    config = OptimConfig.model_validate({"warmup": 10, "min_lr_ratio": 0.1, **settings})
    return [lr_factor(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warms_up_to_the_peak_and_ends_at_the_floor(schedule: str) -> None:
    values = curve(schedule=schedule)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(values) == 1.0
    assert values[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = curve(steps=101, warmup=0, schedule="cosine", min_lr_ratio=0.0)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.5)
    assert values[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_then_falls_over_the_decay_share() -> None:
    values = curve(schedule="wsd", decay=0.2, min_lr_ratio=0.0)
    assert values[10:80] == [1.0] * 70
    assert values[89] == pytest.approx(0.5)
    assert values[99] == 0.0


def test_warmup_is_steps_or_a_share_and_fits_the_run() -> None:
    assert (warmup_steps(0.02, 1000), warmup_steps(7, 1000), warmup_steps(50, 10)) == (20, 7, 10)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_run_of_one_step_trains(schedule: str) -> None:
    assert all(v > 0 for v in curve(steps=1, warmup=0, schedule=schedule, min_lr_ratio=0.0))
