"""The estimate against what a step really allocates, and advice that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from groundup.config import Recipe, build_recipe
from groundup.errors import UserError
from groundup.model.presets import preset
from groundup.model.transformer import Transformer
from groundup.objectives.next_token import next_token
from groundup.optim.build import build_optimizer
from groundup.plan import machine, memory
from groundup.plan.memory import check_fits, estimate, plan_recipe, suggest
from groundup.train.prepare import recompute_blocks

BASE: dict[str, Any] = {"stage": "pretrain", "model": "tiny", "data": ["x.jsonl"], "output": "out"}


def recipe_of(model: str = "tiny", optim: str = "adamw", **train: Any) -> Recipe:
    return build_recipe({**BASE, "model": model, "train": train, "optim": {"name": optim}})


def live_peak(recipe: Recipe, model: Any = None) -> int:
    """Bytes of a real second step at their highest, from the profiler's record of every allocation."""
    train = recipe.train
    model = Transformer(preset(recipe.model)) if model is None else model
    config = model.config
    optimizer = build_optimizer(model, recipe.optim)
    if train.activation_checkpointing:
        recompute_blocks(model.blocks)
    ids_BT = torch.randint(config.vocab_size, (train.batch_size, train.seq_len))
    places_BT = torch.arange(train.seq_len).expand_as(ids_BT)

    def step() -> None:
        for _ in range(train.accumulate):
            hidden_BTD = model.hidden(ids_BT, places_BT, torch.zeros_like(ids_BT, dtype=torch.int32))
            total, count = next_token(hidden_BTD, model.head_weight, ids_BT)
            (total / count).backward()
            del hidden_BTD, total
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    changes: list[tuple[int, int]] = []

    def collect(event: Any) -> None:
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
        for child in event.children:
            collect(child)

    for event in record.profiler.kineto_results.experimental_event_tree():
        collect(event)
    now = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        now += change
        peak = max(peak, now)
    state = [v for part in optimizer.state_dict().values() for s in part["state"].values() for v in s.values()]
    held = [p for p in model.parameters()] + [v for v in state if torch.is_tensor(v)]
    return peak + sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of(batch_size=2, seq_len=128),
        recipe_of(batch_size=8, seq_len=192),
        recipe_of(batch_size=8, seq_len=192, activation_checkpointing=True),
        recipe_of(batch_size=4, seq_len=192, optim="muon"),
        recipe_of("5m", batch_size=2, seq_len=128, accumulate=2),
    ],
    ids=["short", "long", "recomputed", "muon", "5m-accumulate"],
)
def test_estimate_is_within_a_fifth_of_the_measured_peak(recipe: Recipe) -> None:
    estimated, measured = estimate(preset(recipe.model), recipe)["total"], live_peak(recipe)
    assert 0.85 <= estimated / measured <= 1.2, f"estimated {estimated / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB"


def test_parts_that_are_counted_exactly() -> None:
    config = preset("tiny")
    model = Transformer(config)
    size = 4 * sum(p.numel() for p in model.parameters())
    parts = estimate(config, recipe_of(ema=0.99))
    assert (parts["weights"], parts["gradients"], parts["optimizer"], parts["ema"]) == (size, size, 2 * size, size)
    matrices = 4 * sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert estimate(config, recipe_of(optim="muon"))["optimizer"] == 2 * size - matrices


def test_settings_move_the_estimate_the_right_way() -> None:
    config = preset("tiny")
    plain = estimate(config, recipe_of(batch_size=8, seq_len=256))
    assert estimate(config, recipe_of(batch_size=16, seq_len=256))["activations"] > 1.8 * plain["activations"]
    recomputed = estimate(config, recipe_of(batch_size=8, seq_len=256, activation_checkpointing=True))
    assert recomputed["activations"] < 0.5 * plain["activations"]
    assert recomputed["total"] < plain["total"]


def test_the_estimate_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    memory._probe.cache_clear()
    estimate(preset("tiny"), recipe_of())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3, 0.15])
def test_the_suggestion_fits(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Applied to the recipe as the user would, it passes, and each step still sees as many rows."""
    recipe, config = recipe_of(batch_size=16, seq_len=512), preset("tiny")
    free = int(share * memory.MARGIN["cpu"] * estimate(config, recipe)["total"])
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    with pytest.raises(UserError, match=r"train\.batch_size: 16 rows of 512 tokens need about") as fault:
        check_fits(config, recipe)
    assert fault.value.fix.startswith("use train.")
    smaller = build_recipe(recipe.model_dump(mode="json"), fault.value.fix.removeprefix("use ").split())
    assert check_fits(config, smaller)["total"] * memory.MARGIN["cpu"] <= free
    assert smaller.train.batch_size * smaller.train.accumulate == 16


def test_what_never_fits_asks_for_a_smaller_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert suggest(preset("5m"), recipe_of("5m", batch_size=4), "cpu", 10**6).startswith("choose a smaller model")


def test_what_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    assert check_fits(preset("tiny"), recipe_of()) == estimate(preset("tiny"), recipe_of())


def test_plan_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_of(batch_size=4, device="cpu").to_yaml(), encoding="utf-8")
    plan = plan_recipe(path)
    assert plan["fits"]
    assert plan["total_bytes"] == estimate(preset("tiny"), recipe_of(batch_size=4))["total"]
    assert "advice" not in plan
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**8)
    plan = plan_recipe(path, ["train.batch_size=64"])
    assert not plan["fits"]
    assert "train.batch_size=" in plan["advice"]


def cgroup(folder: Path, limit: str, used: int, inactive: int = 0, names: tuple[str, str] = ("max", "current")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{names[0]}").write_text(limit + "\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_the_tightest_cgroup_counts(tmp_path: Path) -> None:
    """v2: our group and all above it; page cache that can be dropped is free."""
    assert machine.cgroup_left(tmp_path, "/a/b") is None
    cgroup(tmp_path / "a" / "b", "max", 10)
    assert machine.cgroup_left(tmp_path, "/a/b") is None
    cgroup(tmp_path / "a", "1000", 700, inactive=100)
    assert machine.cgroup_left(tmp_path, "/a/b") == 400
    cgroup(tmp_path / "a" / "b", "500", 450)
    assert machine.cgroup_left(tmp_path, "/a/b") == 50


def test_cgroup_v1(tmp_path: Path) -> None:
    names = ("limit_in_bytes", "usage_in_bytes")
    cgroup(tmp_path / "memory", str(2**63 - 4096), 10, names=names)
    assert machine.cgroup_left(tmp_path) is None
    cgroup(tmp_path / "memory" / "job", "1000", 400, names=names)
    assert machine.cgroup_left(tmp_path, "/job") == 600


def test_free_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    unlimited = machine.free_memory(cpu)
    assert unlimited > 10**8
    cgroup(tmp_path, "5000", 1000)
    monkeypatch.setattr(machine, "_own_cgroup", lambda: "")
    assert machine.free_memory(cpu) == 4000
