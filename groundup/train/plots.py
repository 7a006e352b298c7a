"""What did the run look like? Loss, learning rate, speed and what else it measured over the steps, in one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from groundup.files import write_atomic

# A panel is drawn where the run has one of its figures.
PANELS = {
    "loss (nats per token)": ("loss", "val_loss"),
    "cross entropy (nats per token)": ("cross_entropy", "val_cross_entropy"),
    "divergence from the teacher (nats per token)": ("divergence", "val_divergence"),
    "distance of layers": ("hidden", "val_hidden", "attention", "val_attention"),
    "log p of chosen answers": ("logps/chosen", "val_logps/chosen"),
    "log p of rejected answers": ("logps/rejected", "val_logps/rejected"),
    "rewards by the policy itself": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "pairs told apart": ("rewards/accuracies", "val_rewards/accuracies"),
    "accuracy": ("train_accuracy", "accuracy", "longer_baseline", "majority_baseline"),
    "scores": ("chosen_score", "rejected_score", "right_score", "wrong_score"),
    "calibration": ("calibration_error", "brier"),
    "reward": ("reward", "val_reward"),
    "spread of rewards": ("reward_std", "groups_equal"),
    "KL from the reference (nats an answer)": ("kl_reply",),
    "KL in the loss, and to the sampled policy": ("kl", "approx_kl"),
    "entropy (nats per token)": ("entropy",),
    "clipped share": ("clip_fraction_low", "clip_fraction_high", "value_clip_fraction"),
    "ratio extremes": ("ratio_min", "ratio_max"),
    "tokens an answer": ("completion_length", "val_length"),
    "truncated share": ("truncated", "val_truncated"),
    "explained variance": ("explained_variance",),
    "engine against trainer (probability)": ("probability_difference",),
    "learning rate": ("lr",),
    "tokens per second": ("tokens_per_second",),
}
COLUMNS = 4


def draw(metrics: Path, picture: Path, title: str) -> None:
    """Read metrics.jsonl and write a PNG with one panel a figure."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = {name for line in lines for name in line}
    panels = {label: names for label, names in _panels(found).items() if found.intersection(names)}
    columns = len(panels) if len(panels) <= COLUMNS else COLUMNS
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.1 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, (label, names) in zip(places, panels.items(), strict=False):
        for name in names:
            x, y = _series(lines, name)
            if x:
                axes.plot(x, y, marker="o" if name.startswith("val_") or len(x) < 3 else None, ms=3, label=name)
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.3)
        if len(names) > 1 and axes.lines:
            axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    write_atomic(picture, out.getvalue())


def _panels(found: set[str]) -> dict[str, tuple[str, ...]]:
    """Where rewards are trained, the loss has no unit and says little: it goes last; parts of rewards get a panel."""
    if "reward" not in found:
        pairs = found & {"rewards/chosen", "train_accuracy"}  # their loss is of whole answers
        return {"loss" if pairs and label.startswith("loss") else label: names for label, names in PANELS.items()}
    parts = tuple(sorted(name for name in found if name.startswith("reward/")))
    first = {"reward": PANELS["reward"], "parts of the reward": parts}
    rest = {label: names for label, names in PANELS.items() if label not in ("reward", "loss (nats per token)")}
    return first | rest | {"loss": ("loss", "policy_loss", "value_loss", "ptx_loss")}


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [x for x, _ in points], [y for _, y in points]
