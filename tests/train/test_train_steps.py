"""The loop's arithmetic: against a loop written out by hand, and against itself in other shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from train_helpers import figures, furthest, weights

from groundup.config import build_recipe
from groundup.dist import World
from groundup.errors import UserError
from groundup.model.flops import Flops
from groundup.model.io import load_model
from groundup.optim import lr_factor
from groundup.tokenizer import load_tokenizer
from groundup.train.ema import EMA
from groundup.train.pretrain import Pretrain
from groundup.train.stage import Place, TokenStage

Make = Callable[..., dict[str, Any]]
Run = Callable[..., dict[str, Any]]


def stage_of(recipe: dict[str, Any]) -> Pretrain:
    parsed = build_recipe(recipe)
    data = Pretrain.open(parsed, load_tokenizer(recipe["model"]), Path(recipe["cache"]))
    return Pretrain(data, parsed, Place(torch.device("cpu"), World()), load_tokenizer(recipe["model"]))


def plain_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """All logits at once, summed."""
    logits = model(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=-100, reduction="sum")


def test_equals_a_loop_written_out(recipe: Make, run: Run) -> None:
    settings = recipe(**{"train.accumulate": 2, "train.max_grad_norm": 0.5})
    run(settings)
    stage, optim = stage_of(settings), build_recipe(settings).optim
    model = load_model(settings["model"], dtype=torch.float32).train()
    decay = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    logged = []
    for step in range(6):
        for group in adamw.param_groups:
            group["lr"] = 3e-3 * lr_factor(step, 6, optim)
        window = [stage.loader.batch_at(2 * step + i) for i in range(2)]
        count = sum(int((b.labels_BT != -100).sum()) for b in window)
        loss = sum(plain_loss(model, b) for b in window) / count
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        logged.append((float(loss.detach()), float(norm), count))
    assert furthest(weights(settings["output"]), dict(model.named_parameters())) < 2e-5
    lines = [line for line in figures(settings["output"]) if "loss" in line]
    for line in lines:  # a line holds the mean over its steps' tokens
        here = logged[line["step"] - 2 : line["step"]]
        mean = sum(loss * count for loss, _, count in here) / sum(count for _, _, count in here)
        assert line["loss"] == pytest.approx(mean, abs=1e-4)
        assert line["grad_norm"] == pytest.approx(here[-1][1], rel=1e-3)
        assert line["lr"] == pytest.approx(3e-3 * lr_factor(line["step"] - 1, 6, optim))


def test_accumulation_is_the_larger_batch(recipe: Make, run: Run, ground: Path) -> None:
    """Also where micro-batches hold very different numbers of trained tokens, as chats do."""
    chat = {"stage": "sft", "data": str(ground / "chat.jsonl"), "train.steps": 4, "train.seq_len": 64}
    chat["eval.fraction"] = 0.0
    counts = set()
    for batch_size, accumulate in ((8, 1), (1, 8), (2, 4)):
        settings = {**chat, "train.batch_size": batch_size, "train.accumulate": accumulate}
        run(recipe(output=f"b{batch_size}", **settings), progress=lambda line: counts.add(line["tokens"]))
    output = Path(recipe()["output"]).parent
    whole = weights(output / "b8")
    assert furthest(whole, load_model(recipe()["model"]).state_dict()) > 1e-3, "nothing was learnt"
    assert furthest(whole, weights(output / "b1")) < 2e-5
    assert furthest(whole, weights(output / "b2")) < 2e-5
    assert len(counts) == 2, "all runs must have seen the same tokens at both logged steps"


def test_recomputation_changes_nothing(recipe: Make, run: Run) -> None:
    run(recipe(output="kept"))
    run(recipe(output="again", **{"train.activation_checkpointing": True}))
    output = Path(recipe()["output"]).parent
    assert furthest(weights(output / "kept"), weights(output / "again")) == 0.0


def test_the_held_out_figures_are_those_of_the_saved_weights(recipe: Make, run: Run) -> None:
    settings = recipe(**{"train.eval_rows": 1000})
    result = run(settings)
    val, model = stage_of(settings).val, load_model(settings["output"])
    assert val is not None
    batch = val.batch(torch.arange(len(val)).numpy())
    with torch.no_grad():
        nats = float(plain_loss(model, batch))
    assert result["metrics"]["val_loss"] == pytest.approx(nats / val.trained_tokens, rel=1e-5)
    assert result["metrics"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / val.bytes, rel=1e-5)


def test_what_a_run_says_and_leaves(recipe: Make, run: Run) -> None:
    lines: list[dict[str, Any]] = []
    settings = recipe(**{"log.plots": True})
    result = run(settings, progress=lines.append)
    output = Path(settings["output"])
    assert {"name", "seconds", "tokens", "steps", "metrics", "output", "parameters"} <= result.keys()
    assert (result["name"], result["steps"], result["output"]) == ("pretrain", 6, str(output))
    assert {"loss", "val_loss", "bits_per_byte", "tokens_per_second", "share_of_peak"} <= result["metrics"].keys()
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()] == lines
    assert lines[-2]["tokens"] == result["tokens"] <= 6 * 4 * 32
    names = {p.name for p in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "curves.png", "checkpoints"} <= names
    assert not any(p.suffix in (".pt", ".pth", ".bin", ".pkl") for p in output.rglob("*"))


def test_the_folder_is_stock(recipe: Make, run: Run) -> None:
    transformers = pytest.importorskip("transformers")
    settings = recipe()
    run(settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(settings["output"])
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(settings["output"])("the cat sat")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, load_model(settings["output"])(ids), atol=1e-4, rtol=0)


def test_a_loss_that_is_no_number_stops_the_run_with_its_batch(
    recipe: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, real, calls = recipe(**{"eval.fraction": 0.0}), TokenStage.loss, []

    def poisoned(self: TokenStage, model: torch.nn.Module, batch: Any) -> Any:
        calls.append(batch)
        total, count, metrics = real(self, model, batch)
        return (total * float("nan") if len(calls) == 4 else total), count, metrics

    monkeypatch.setattr(TokenStage, "loss", poisoned)
    with pytest.raises(UserError, match=r"step 4 gave loss nan.*saved"):
        run(settings)
    output = Path(settings["output"])
    saved = load_file(output / "bad-batch-rank-0.safetensors")
    assert torch.equal(saved["0.input_ids_BT"], stage_of(settings).loader.batch_at(3).input_ids_BT)
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.setattr(TokenStage, "loss", real)
    assert run(settings)["steps"] == 6  # goes on from step 2


def test_early_stop_keeps_the_best(recipe: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 3.0, 4.0, 4.5, 1.0])
    monkeypatch.setattr(TokenStage, "evaluate", lambda self, model: {"val_loss": next(losses)})
    settings = recipe(**{"train.steps": 20, "train.early_stop": 2, "train.eval_every": 2, "train.keep_last": 1})
    result = run(settings)
    assert result["steps"] == 8 and result["metrics"]["val_loss"] == 3.0
    checkpoints = Path(settings["output"]) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-4", "step-8"]
    best = load_file(checkpoints / "step-4" / "model.safetensors")
    assert furthest(weights(settings["output"]), best) == 0.0


def test_ema_weights_are_the_average_and_are_what_is_saved(recipe: Make, run: Run) -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    ema, seen = EMA(model, 0.5), [model.weight.detach().clone()]
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update(step)
        seen.append(model.weight.detach().clone())
    average = seen[0]
    for step, value in enumerate(seen[1:], 1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(ema.weights["weight"], average)
    with ema.applied():
        assert torch.equal(model.weight, ema.weights["weight"])
    assert torch.equal(model.weight, seen[-1])

    settings = recipe(**{"train.ema": 0.9})
    run(settings)
    last = Path(settings["output"]) / "checkpoints" / "step-6"
    assert furthest(weights(settings["output"]), load_file(last / "ema.safetensors")) == 0.0
    assert furthest(weights(settings["output"]), load_file(last / "model.safetensors")) > 1e-4


def test_bf16_keeps_fp32_masters(recipe: Make, run: Run) -> None:
    settings = recipe(**{"train.dtype": "bf16", "train.steps": 2})
    run(settings)
    saved = weights(settings["output"])
    assert {t.dtype for t in saved.values()} == {torch.float32}
    before = load_model(settings["model"]).state_dict()
    moved = saved["model.norm.weight"] - before["model.norm.weight"]
    assert 0 < moved.abs().max() < 0.1


def test_epochs_decide_the_steps_where_steps_does_not(recipe: Make, run: Run) -> None:
    settings = recipe(**{"train.steps": None, "train.epochs": 0.5, "train.accumulate": 2})
    rows = len(stage_of(settings).train)
    assert run(settings)["steps"] == math.ceil(0.5 * rows / 8)


def test_muon_trains(recipe: Make, run: Run) -> None:
    lines: list[dict[str, Any]] = []
    run(recipe(**{"optim.name": "muon", "train.steps": 20}), progress=lines.append)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1.0


def test_flops_of_a_step_are_those_that_torch_counts(recipe: Make) -> None:
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    theirs = transformers.AutoModelForCausalLM.from_pretrained(recipe()["model"], attn_implementation="eager")
    config = load_model(recipe()["model"]).config
    with FlopCounterMode(display=False) as counter:
        theirs(torch.zeros(2, 32, dtype=torch.long)).logits.sum().backward()
    attention = Flops(config, 32)(64, 64) - Flops(config, 0)(64, 64)
    # ours counts the causal half of the scores, torch here all of them
    assert Flops(config, 32)(64, 64) + attention == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale(
    recipe: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler of a GPU run, driven on a CPU: the gradients of step 2 are made infinite."""
    from contextlib import nullcontext

    from groundup.train import loop

    monkeypatch.setattr(loop, "pick_dtype", lambda name, device: torch.float16)
    monkeypatch.setattr(loop, "autocast", lambda device, dtype: nullcontext())
    real, seen = loop.Loop.update, []

    def update(self: loop.Loop) -> torch.Tensor:
        if self.state.step == 1:
            self.trained[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
        before = self.trained[0].detach().clone()
        norm = real(self)
        seen.append((self.scaler.get_scale(), bool((before != self.trained[0]).any())))
        return norm

    monkeypatch.setattr(loop.Loop, "update", update)
    run(recipe(**{"train.steps": 3, "eval.fraction": 0.0}))
    assert seen == [(65536.0, True), (32768.0, False), (32768.0, True)]


def test_out_of_memory_names_the_setting(recipe: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(self: TokenStage, model: torch.nn.Module, batch: Any) -> Any:
        return torch.empty(2**60)

    monkeypatch.setattr(TokenStage, "loss", hungry)
    with pytest.raises(UserError, match=r"train.batch_size: a step does not fit into memory.*halve train.batch_size"):
        run(recipe())


def test_what_a_person_sees(capsys: pytest.CaptureFixture[str]) -> None:
    from groundup.train.progress import Progress, bar, clock

    figures = {"step": 2, "loss": 1.5, "lr": 1e-3, "tokens_per_second": 1234.0, "share_of_peak": 0.5}
    with Progress("sft", 10) as shown:
        shown.tick(2, 30.0, figures)
        shown.log(figures)
        shown.log({"step": 2, "val_loss": 1.25, "bits_per_byte": 0.5})
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("sft: step 2/10  loss 1.5000  lr 1.00e-03  1,234 tokens/s  50% of peak  04:00 left")
    assert said[1].endswith("sft: step 2/10  held out: val loss 1.2500  bits per byte 0.5000")
    with Progress("sft", 10, on=False) as silent:
        silent.log(figures)
    assert capsys.readouterr().err == ""
    assert (clock(59.6), clock(3909), bar(0.5, 4)) == ("01:00", "1:05:09", "━━╌╌")


@pytest.mark.slow
def test_compiled_blocks_give_the_eager_weights(recipe: Make, run: Run) -> None:
    run(recipe(output="eager"))
    run(recipe(output="compiled", **{"train.compile": "blocks"}))
    output = Path(recipe()["output"]).parent
    assert furthest(weights(output / "eager"), weights(output / "compiled")) < 1e-4
