"""What did the run look like? Loss, learning rate and speed over the steps, in one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from groundup.files import write_atomic

PANELS = {
    "loss (nats per token)": ("loss", "val_loss"),
    "learning rate": ("lr",),
    "tokens per second": ("tokens_per_second",),
}


def draw(metrics: Path, picture: Path, title: str) -> None:
    """Read metrics.jsonl and write a PNG with one panel a figure."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (label, names) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name in names:
            x, y = _series(lines, name)
            if x:
                axes.plot(x, y, marker="o" if name == "val_loss" or len(x) < 3 else None, ms=3, label=name)
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.3)
        if len(names) > 1 and axes.lines:
            axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    write_atomic(picture, out.getvalue())


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [x for x, _ in points], [y for _, y in points]
