"""Paged AdamW: torch's AdamW in all but where its moments lie. Without CUDA they lie in ordinary memory."""

from __future__ import annotations

import pytest
import torch

from groundup.errors import UserError
from groundup.optim.paged import make_paged_adamw, paged_adamw

pytest.importorskip("bitsandbytes", reason="whose pages these are")
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


def weights() -> list[torch.Tensor]:
    return [torch.linspace(-1, 1, 24).view(4, 6).requires_grad_(), torch.linspace(1, 2, 5).requires_grad_()]


def groups(params: list[torch.Tensor]) -> list[dict]:
    return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]


def move(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum(p.pow(3).sum() for p in params).backward()
        optimizer.step()


@pytest.fixture
def plain_arithmetic(monkeypatch):
    """Off CUDA bitsandbytes compiles its arithmetic, which takes half a minute."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr(torch._dynamo.config, "disable", True)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_it_moves_as_torch_s_adamw_and_goes_on_from_its_state(plain_arithmetic):
    ours, theirs = weights(), weights()
    paged = make_paged_adamw(groups(ours), **SETTINGS, weight_decay=0.0)
    adamw = torch.optim.AdamW(groups(theirs), **SETTINGS)
    move(paged, ours, 3)
    move(adamw, theirs, 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    state, wanted = paged.state_dict()["state"], adamw.state_dict()["state"]
    assert state.keys() == wanted.keys() == {0, 1}
    for index in state:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[index][name], wanted[index][name], rtol=1e-5, atol=1e-7)
    assert all(isinstance(tensor, torch.Tensor) for one in state.values() for tensor in one.values())

    copies = [p.detach().clone().requires_grad_() for p in ours]
    resumed = make_paged_adamw(groups(copies), **SETTINGS, weight_decay=0.0)
    resumed.load_state_dict(paged.state_dict())
    move(resumed, copies, 2)
    move(paged, ours, 2)
    for a, b in zip(copies, ours, strict=True):
        assert torch.equal(a, b)


def test_without_cuda_it_is_refused():
    with pytest.raises(UserError, match="pages are CUDA's"):
        paged_adamw(groups(weights()), **SETTINGS)
    with pytest.raises(UserError, match="pages are CUDA's"):
        paged_adamw(weights(), **SETTINGS)
