"""The machine: what is refused, and when blocks are compiled."""

from __future__ import annotations

import pytest
import torch

from groundup.device import compile_policy, describe, peak_flops, pick_device, pick_dtype
from groundup.errors import UserError

CPU = torch.device("cpu")


def test_unknown_or_missing_devices_are_named() -> None:
    with pytest.raises(UserError, match="toaster"):
        pick_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="CUDA"):
            pick_device("cuda")


def test_number_types() -> None:
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="GPU"):
        pick_dtype("fp16", CPU)


def test_compile_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compile_policy("off", CPU).on
    assert not compile_policy("auto", CPU).on
    assert compile_policy("auto", torch.device("cuda")).on
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="compiler"):
        compile_policy("blocks", CPU)


def test_the_peak_is_a_rate_of_this_machine() -> None:
    assert 1e8 < peak_flops("cpu", "fp32", seconds=0.02, size=128) < 1e14
    assert describe()["torch"] == torch.__version__
