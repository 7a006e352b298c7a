"""What did it look like? Two plots from figures that the run already wrote. English labels: no CJK font is needed."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError
from groundup.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION, GREY = "#3b6fb6", "#d1603d", "#9aa0a6"
LANGUAGES = {"world_exact_zh": ("Chinese", "#d1603d"), "world_exact_en": ("English", "#3b6fb6")}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut by a kill is left out. UserError: no file, or a broken line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", "name the metrics.jsonl of a run") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number}", "is not JSON", "remove that line") from None
    return rows


def series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the lines that hold a finite number under key; of a step written twice, the later one."""
    points = {r["step"]: r[key] for r in rows if "step" in r and isinstance(r.get(key), (int, float))}
    points = {step: v for step, v in points.items() if abs(v) < float("inf")}
    steps = sorted(points)
    return steps, [points[s] for s in steps]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the window of neighbours, shorter at both ends."""
    half = window // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(s) / len(s) for s in spans]


def draw_curves(curves: dict[str, list[dict[str, Any]]], path: str | Path) -> bool:
    """Loss (left axis) and held-out bits per byte (right axis) by step, a panel a stage. False: nothing to draw."""
    curves = {stage: rows for stage, rows in curves.items() if series(rows, "loss")[0]}
    if not curves:
        return False
    figure = new_figure(6.2 * len(curves), 3.8)
    for i, (stage, rows) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), i + 1)
        steps, loss = series(rows, "loss")
        axes.plot(steps, loss, color=TRAIN, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth(loss, max(3, len(loss) // 20)), color=TRAIN, linewidth=1.8, label="training loss")
        style_axes(axes, stage, "optimizer steps", "loss (nats per token)")
        handles = axes.get_lines()[1:]
        steps, bits = series(rows, "bits_per_byte")
        if steps:
            twin = axes.twinx()
            marker = "o" if len(steps) < 40 else None
            label = f"held-out bits per byte (last: {bits[-1]:.3f})"
            twin.plot(steps, bits, color=VALIDATION, marker=marker, ms=3.5, linewidth=1.5, label=label)
            twin.set_ylabel("bits per byte", color=VALIDATION)
            twin.tick_params(axis="y", colors=VALIDATION, length=0)
            twin.spines[["top", "left", "right", "bottom"]].set_visible(False)
            handles += twin.get_lines()
        axes.legend(handles=handles, frameon=False, loc="upper right")
    save_figure(figure, path)
    return True


def draw_accuracy(stages: Sequence[dict[str, Any]], baseline: dict[str, Any], path: str | Path) -> bool:
    """Exact match by stage and language, beside the baseline. False: no stage has such a figure."""
    shown = [(s["name"], s["metrics"]) for s in stages if any(k in s["metrics"] for k in LANGUAGES)]
    if not shown:
        return False
    groups = ([("baseline:\ncopy nearest", baseline)] if any(k in baseline for k in LANGUAGES) else []) + shown
    figure = new_figure(2.2 + 1.5 * len(groups), 3.8)
    axes = figure.add_subplot()
    for n, (key, (language, color)) in enumerate(LANGUAGES.items()):
        places = [i + (n - 0.5) * 0.36 for i, (_, m) in enumerate(groups) if m.get(key) is not None]
        heights = [100 * m[key] for _, m in groups if m.get(key) is not None]
        bars = axes.bar(places, heights, 0.34, color=color, label=language)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    style_axes(axes, "Held-out questions answered exactly", "", "exact match (%)")
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.tick_params(axis="x", length=0)
    axes.legend(frameon=False, loc="upper left")
    save_figure(figure, path)
    return True


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def save_figure(figure: Figure, path: str | Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(path, image.getvalue())
