"""How much can be learnt in so many minutes? One dial, the depth; everything else follows from it and the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.config import OptimConfig
    from groundup.model.config import ModelConfig

# The quickstart's settings. Seconds of training are split between the stages; evaluation and saving come on top.
PRETRAIN_SHARE = 0.5
SFT_SHARE = 0.5
TOKENS_PER_PARAMETER = 2.0  # of pretraining, the least: a deeper model is chosen while it still sees so many
DEPTHS = range(2, 25)
SEQ_LEN = 512
BATCH_TOKENS = 2048  # in an optimizer step of the smallest model
MAX_BATCH_TOKENS = 65536
STEPS = 3000  # wanted in a stage: the batch grows when there is time for more
LR, LR_WIDTH = 1.5e-2, 128  # AdamW's peak at that width; falls with the square root of the width
MUON_LR = 0.01  # Muon's steps are scaled by the shape of each matrix: the width leaves it alone
SFT_LR_RATIO = 0.5
MAX_EPOCHS = 4.0  # over own files: repeating text more often teaches little (Muennighoff et al. 2023, arXiv 2305.16264)
OPTIM = {"name": "muon", "schedule": "linear", "warmup": 0.02, "min_lr_ratio": 0.0, "weight_decay": 0.0}
SAVING = 0.93  # of the time goes into steps; the rest into checkpoints, held-out losses and slower moments
# Share of the matrix-product peak that a step reaches, by millions of parameters; between them by interpolation.
SHARE_OF_PEAK = ((1.0, 0.40), (5.0, 0.55), (26.0, 0.65), (100.0, 0.70))

Rate = Callable[["ModelConfig", int, int], float]  # (config, batch_size, seq_len) -> tokens per second


@dataclass(frozen=True)
class StagePlan:
    """One stage: seconds it should take, tokens (positions) and optimizer steps in them, learning rates."""

    seconds: float
    tokens: int
    steps: int
    lr: float
    muon_lr: float


@dataclass(frozen=True)
class QuickstartPlan:
    """What a budget of minutes becomes. tokens_per_second: what it was reckoned with."""

    config: ModelConfig
    depth: int
    parameters: int
    seq_len: int
    batch_size: int
    tokens_per_second: float
    pretrain: StagePlan
    sft: StagePlan

    def derived(self) -> dict[str, Any]:
        """The plan in flat figures, for report and log."""
        c = self.config
        return {
            "depth": self.depth,
            "parameters": self.parameters,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "heads": f"{c.num_attention_heads} ({c.num_key_value_heads} kv) of {c.head_dim}",
            "vocab_size": c.vocab_size,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "tokens_per_second": round(self.tokens_per_second),
            **{
                f"{name}_{key}": value
                for name, stage in (("pretrain", self.pretrain), ("sft", self.sft))
                for key, value in {
                    "seconds": round(stage.seconds),
                    "tokens": stage.tokens,
                    "steps": stage.steps,
                    "lr": float(f"{stage.lr:.3g}"),
                    "muon_lr": float(f"{stage.muon_lr:.3g}"),
                }.items()
            },
        }

    def lines(self) -> list[str]:
        """The plan for people, a line an idea."""
        c = self.config
        stages = (("pretrain", self.pretrain), ("sft", self.sft))
        return [
            f"depth {self.depth} -> {c.hidden_size} wide, {c.num_attention_heads} heads, "
            f"{self.parameters / 1e6:.2f}M parameters, vocabulary {c.vocab_size:,}",
            f"{self.tokens_per_second:,.0f} tokens/s -> {self.batch_size} rows of {self.seq_len} tokens a step",
            *(
                f"{name}: {s.seconds / 60:.1f} min, {s.tokens / 1e6:.2f}M tokens, {s.steps:,} steps, peak lr {s.lr:.2g}"
                for name, s in stages
            ),
        ]


def plan_quickstart(
    minutes: float,
    depth: int | None = None,
    vocab_size: int = 6400,
    *,
    available: Mapping[str, float | None] | None = None,
    tokens_per_second: Rate | None = None,
    peak: float | None = None,
) -> QuickstartPlan:
    """Derive model, batch, tokens and learning rates from minutes of training.

    available: tokens that the data of "pretrain" and "sft" hold; None (or absent): as many as wanted, 0: no such stage.
    A stage whose data is short takes less time, and the model is made deeper to use it.
    tokens_per_second: measures a model on this machine (`measure_step`); it is asked once, for the chosen depth.
    peak: the machine's matrix-product rate in FLOP/s, from which speeds are guessed; measured here if not given.
    depth: layers instead of what fits. Raises UserError when minutes is not positive or depth is under 1.
    """
    from groundup.device import peak_flops, pick_device
    from groundup.model.config import num_parameters
    from groundup.model.presets import scaled

    if minutes <= 0:
        raise UserError("--minutes", f"{minutes:g} is no budget", "give a positive number of minutes")
    if peak is None:
        device = pick_device()
        peak = peak_flops(str(device), "bf16" if device.type == "cuda" else "fp32")
    seconds = 60 * minutes * SAVING
    limits = {name: _limit((available or {}).get(name)) for name in ("pretrain", "sft")}
    shares = _shares(limits)
    chosen = depth or _deepest(seconds, shares, limits, vocab_size, peak)
    config = scaled(chosen, vocab_size)
    guess = guessed_rate(config, SEQ_LEN, peak)
    batch_size = _batch_size(guess * seconds * min(share for share in shares.values() if share))
    rate = tokens_per_second(config, batch_size, SEQ_LEN) if tokens_per_second else guess
    lr = LR * (LR_WIDTH / config.hidden_size) ** 0.5

    def stage(name: str, factor: float) -> StagePlan:
        wanted = min(rate * seconds * shares[name], limits[name])
        steps = max(1, int(wanted / (batch_size * SEQ_LEN))) if wanted else 0
        tokens = steps * batch_size * SEQ_LEN
        return StagePlan(tokens / rate, tokens, steps, lr * factor, MUON_LR * factor)

    return QuickstartPlan(
        config=config,
        depth=chosen,
        parameters=num_parameters(config),
        seq_len=SEQ_LEN,
        batch_size=batch_size,
        tokens_per_second=rate,
        pretrain=stage("pretrain", 1.0),
        sft=stage("sft", SFT_LR_RATIO),
    )


def _limit(available: float | None) -> float:
    """Most tokens that a stage may see."""
    return float("inf") if available is None else MAX_EPOCHS * available


def _shares(limits: Mapping[str, float]) -> dict[str, float]:
    """Each stage's share of the time; a stage without data leaves its share to the other."""
    wanted = {"pretrain": PRETRAIN_SHARE, "sft": SFT_SHARE}
    total = sum(share for name, share in wanted.items() if limits[name])
    if not total:
        raise UserError("--data", "holds no token to train on", "give text or chat files")
    return {name: share / total if limits[name] else 0.0 for name, share in wanted.items()}


def _deepest(
    seconds: float, shares: Mapping[str, float], limits: Mapping[str, float], vocab_size: int, peak: float
) -> int:
    """The deepest model that sees TOKENS_PER_PARAMETER tokens for each of its parameters in the time.

    Where the data runs out before the time does, the shallowest model that no longer runs out, if that is deeper.
    """
    from groundup.model.config import num_parameters
    from groundup.model.presets import scaled

    enough, short = [], []
    for depth in DEPTHS:
        config = scaled(depth, vocab_size)
        in_time = guessed_rate(config, SEQ_LEN, peak) * seconds
        if in_time >= TOKENS_PER_PARAMETER * num_parameters(config):
            enough.append(depth)
        if any(in_time * shares[name] > limits[name] > 0 for name in limits):
            short.append(depth)
    return max([DEPTHS[0], *enough, *(min(depth + 1, DEPTHS[-1]) for depth in short)])


def _batch_size(tokens: float) -> int:
    """Rows a step: a power of two, so many that `tokens` make about STEPS steps."""
    wanted = min(max(tokens / STEPS, BATCH_TOKENS), MAX_BATCH_TOKENS)
    size = BATCH_TOKENS // SEQ_LEN
    while 2 * size * SEQ_LEN <= wanted:
        size *= 2
    return size


def guessed_rate(config: ModelConfig, seq_len: int, peak: float) -> float:
    """Tokens per second that a model of this size should reach where matrix products run at `peak` FLOP/s."""
    import numpy

    from groundup.model.config import num_parameters
    from groundup.model.flops import Flops

    sizes, shares = zip(*SHARE_OF_PEAK, strict=True)
    share = float(numpy.interp(numpy.log(num_parameters(config) / 1e6), numpy.log(sizes), shares))
    return share * peak / Flops(config, seq_len)(1, 1)


def measure_step(
    config: ModelConfig,
    batch_size: int,
    seq_len: int,
    *,
    optim: OptimConfig | None = None,
    device: str = "auto",
    seconds: float = 4.0,
) -> float:
    """Tokens per second of real training steps on random tokens: the fastest of those made in `seconds`, at least 4.

    The fastest, because whatever else the machine does in this moment will not go on for the whole run. Eager, the
    quickstart's optimizer, all positions trained, documents of 40 tokens. The caller's random state stays as it was.
    """
    import torch

    from groundup.config import OptimConfig
    from groundup.device import autocast, pick_device, pick_dtype
    from groundup.model.transformer import Transformer
    from groundup.objectives.next_token import next_token
    from groundup.optim.build import build_optimizer

    where = pick_device(device)
    dtype = pick_dtype("auto", where)
    sync = torch.cuda.synchronize if where.type == "cuda" else (lambda: None)
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config)
        model.init_weights(0)  # torch's own would make denormal softmax weights, which are slow
        model.to(where)
        ids_BT = torch.randint(config.vocab_size, (batch_size, seq_len)).to(where)
    optimizer = build_optimizer(model, optim or OptimConfig.model_validate(OPTIM))
    places_BT = torch.arange(seq_len, device=where).expand(batch_size, -1)
    doc_ids_BT = (places_BT // 40).to(torch.int32)
    taken: list[float] = []
    while len(taken) < 4 or sum(taken) < seconds:
        start = time.perf_counter()
        with autocast(where, dtype):
            hidden_BTD = model.hidden(ids_BT, places_BT % 40, doc_ids_BT)
            loss, count = next_token(hidden_BTD, model.head_weight, ids_BT)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        sync()
        taken.append(time.perf_counter() - start)
    return batch_size * seq_len / min(taken)
