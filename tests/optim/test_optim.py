"""Muon and the split of weights, against torch's own optimizers and linear algebra."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from groundup.config import OptimConfig
from groundup.optim import Muon, build_optimizer, orthogonalize
from groundup.optim.build import param_groups


class Toy(nn.Module):
    """The parameter names of a decoder, on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 24), "down": nn.Linear(24, 8)}) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return self.lm_head(self.norm(x))


def train(model: nn.Module, optimizer: object, steps: int = 5) -> list[torch.Tensor]:
    for step in range(steps):
        ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()  # type: ignore[attr-defined]
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()  # type: ignore[attr-defined]
    return [p.detach().clone() for p in model.parameters()]


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (3, 20, 12)])
def test_orthogonalize_is_near_the_polar_factor(shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    got = orthogonalize(g)
    values = torch.linalg.svdvals(got)
    assert got.shape == g.shape
    assert values.min() > 0.5 and values.max() < 1.3
    # same singular vectors: what remains after taking U and V away is diagonal
    inner = u.mT @ got @ vh.mT
    torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)
    assert torch.linalg.matrix_norm(got - u @ vh, ord=2).max() < 0.4


def test_batched_matrices_equal_single_ones() -> None:
    g = torch.randn(5, 12, 20)
    torch.testing.assert_close(orthogonalize(g), torch.stack([orthogonalize(m) for m in g]))


def test_bf16_products_equal_torch_muon() -> None:
    muon = pytest.importorskip("torch.optim._muon")
    g = torch.randn(24, 8, generator=torch.Generator().manual_seed(2))
    theirs = muon._zeropower_via_newtonschulz(g.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(orthogonalize(g, dtype=torch.bfloat16), theirs, atol=2e-2, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_steps_as_torch_muon_does() -> None:
    ours, theirs = nn.Linear(12, 24, bias=False), nn.Linear(12, 24, bias=False)
    theirs.load_state_dict(ours.state_dict())
    a = Muon(ours.parameters(), lr=0.02, momentum=0.95, weight_decay=0.1)
    b = torch.optim.Muon(theirs.parameters(), lr=0.02, momentum=0.95, weight_decay=0.1)
    before = ours.weight.detach().clone()
    for step in range(4):
        grad = torch.randn(24, 12, generator=torch.Generator().manual_seed(step))
        ours.weight.grad, theirs.weight.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    moved = (ours.weight - before).norm()
    assert (ours.weight - theirs.weight).norm() < 0.02 * moved  # theirs runs in bf16


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_every_weight_is_moved_once_and_only_matrices_decay() -> None:
    model = toy()
    names = {id(p): n for n, p in model.named_parameters()}
    for muon in (False, True):
        groups = {k: {names[id(p)] for p in v} for k, v in param_groups(model, muon).items()}
        assert sum(map(len, groups.values())) == len(names)
        blocks = {n for n in names.values() if n.startswith("layers.") and n.endswith("weight")}
        assert groups["muon"] == (blocks if muon else set())
        assert groups["decay"] == ({"lm_head.weight"} if muon else blocks | {"lm_head.weight"})
        assert "embed_tokens.weight" in groups["plain"] and "norm.weight" in groups["plain"]


def test_adamw_equals_torch_loop() -> None:
    model, reference = toy(), toy()
    config = OptimConfig(lr=1e-2, weight_decay=0.3)
    matrices = [p for n, p in reference.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in reference.named_parameters() if p.ndim < 2 or "embed" in n]
    loop = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    for a, b in zip(train(model, build_optimizer(model, config)), train(reference, loop), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_dict_goes_on_bitwise(name: str) -> None:
    config = OptimConfig.model_validate({"name": name})
    straight = toy()
    optimizer = build_optimizer(straight, config)
    train(straight, optimizer)
    twin = toy()
    twin.load_state_dict(straight.state_dict())
    resumed = build_optimizer(twin, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own is a view of the living state
    for a, b in zip(train(straight, optimizer), train(twin, resumed), strict=True):
        assert torch.equal(a, b)


def test_set_lr_turns_every_group_from_its_own_peak() -> None:
    optimizer = build_optimizer(toy(), OptimConfig(name="muon", lr=1e-3, muon_lr=0.02))
    optimizer.set_lr(0.1)
    optimizer.set_lr(0.5)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.0005, 0.01]
