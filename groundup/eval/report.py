"""Is it good? The report of a run: report.md for people, report.json for programs, and the plots."""

from __future__ import annotations

import json
import math
import operator
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groundup.eval.plots import draw_accuracy, draw_curves, read_metrics
from groundup.files import write_atomic

PERCENT = (
    "world_exact_zh",
    "world_exact_en",
    "identity_exact_zh",
    "identity_exact_en",
    "share_of_peak",
    "answers_right",
    "thinks",
    "samples_right",
)
COMPARED = (
    "world_exact_zh",
    "world_exact_en",
    "identity_exact_zh",
    "identity_exact_en",
    "text_bits_per_byte",
    "chat_bits_per_byte",
    "answers_right",
    "thinks",
    "answer_tokens",
)  # the same questions and texts after every stage
SUMMARY = ("answers_right", "world_exact_zh", "world_exact_en", "bits_per_byte")
COLUMNS = {  # metric: heading
    "answers_right": "right answers",
    "thinks": "thinks first",
    "answer_tokens": "tokens an answer",
    "samples_right": "samples right",
    "rows_kept": "rows kept",
    "world_exact_zh": "exact match, Chinese",
    "world_exact_en": "exact match, English",
    "identity_exact_zh": "who are you, Chinese",
    "identity_exact_en": "who are you, English",
    "bits_per_byte": "bits per byte",
    "text_bits_per_byte": "of held-out text",
    "chat_bits_per_byte": "of held-out answers",
    "tokens_per_second": "tokens/s",
    "share_of_peak": "share of peak",
}

# Figures of the stages after fine-tuning, and those of them that are no shares.
FIGURES = {
    "longer_baseline": "accuracy of: the longer one wins",
    "preferred_rate_gain": "preferred style, more often",
    "world_exact_change": "right answers, more",
    "preferred_rate": "preferred style",
    "reward_gain_sd": "mean reward, standard deviations higher",
    "reward": "mean reward",
    "kl": "KL from the start, nats a reply",
    "arithmetic_gain": "right sums, more",
    "arithmetic_before": "right sums before",
    "format_rate": "thinks, then answers",
    "format_before": "thinks, then answers, before",
    "accuracy_kept": "of the teacher's accuracy",
    "gain_over_no_teacher": "more right than without a teacher",
    "gain_at_least": "at least (95 % interval)",
    "gain": "a vote over greedy",
}
PLAIN = ("calibration_error", "reward_gain_sd", "reward", "kl")


def write_report(output_dir: str | Path, data: dict[str, Any]) -> dict[str, Any]:
    """Write report.md, report.json, curves.png and accuracy.png into a folder; return what report.json holds.

    data: {"title", "machine": dict, "derived": dict, "stages": [{"name", "seconds", "tokens", "metrics": dict, and
    optionally "before": dict of the same metrics, or "wanted": {metric: ">= 0.9"}, for a table apart}], "baseline":
    dict of metrics, "samples": [{"question", "answer", "expected"}], "curves": {stage: path of its metrics.jsonl},
    "next_commands": [str]}. All but stages may be missing.
    Exact match is held against the stage above (the questions are the same), bits per byte only against the stage's own
    "before" (each stage has held-out text of its own). A figure that is not finite is written as null.
    Raises UserError when the folder cannot be written.
    """
    output = Path(output_dir)
    stages, baseline = data["stages"], data.get("baseline") or {}
    curves = {stage: read_metrics(path) for stage, path in (data.get("curves") or {}).items() if Path(path).exists()}
    plots = []
    if draw_accuracy(stages, baseline, output / "accuracy.png"):
        plots.append("accuracy.png")
    if draw_curves(curves, output / "curves.png"):
        plots.append("curves.png")
    report = {key: value for key, value in data.items() if key != "curves"}
    report |= {"written": time.strftime("%Y-%m-%d %H:%M:%S"), "plots": plots}
    report["seconds"] = round(sum(s.get("seconds") or 0 for s in stages), 1)
    text = json.dumps(_finite(report), ensure_ascii=False, indent=2, default=str) + "\n"
    write_atomic(output / "report.json", text)
    write_atomic(output / "report.md", render(report))
    return report


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    stages = [stage for stage in report["stages"] if "wanted" not in stage]
    parts = [f"# {report.get('title', 'Report')}", _summary(report, stages)]
    parts += ["## Stages 各阶段", _stage_table(stages, report.get("baseline") or {})]
    if aligned := [stage for stage in report["stages"] if "wanted" in stage]:
        head = ["stage", "time", "figure", "got", "wanted", ""]
        parts += ["## After fine-tuning 微调之后", _table(head, after_rows(aligned))]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in report["plots"]]
    if kinds := stages[-1]["metrics"].get("kinds") if stages else None:
        parts += ["## Exact match by kind 各类问题", _kind_table(kinds)]
    if report.get("samples"):
        rows = [[s["question"], s["answer"], s.get("expected", ""), _mark(s)] for s in report["samples"]]
        parts += ["## Sample answers 回答示例", _table(["question", "answer", "expected", ""], rows)]
    if report.get("derived"):
        rows = [[key.replace("_", " "), _figure_text(value)] for key, value in report["derived"].items()]
        parts += ["## What was derived 推导出的设置", _table(["setting", "value"], rows)]
    if report.get("machine"):
        rows = [[key.replace("_", " "), _figure_text(value)] for key, value in report["machine"].items()]
        parts += ["## The machine 机器", _table(["part", "value"], rows)]
    if report.get("next_commands"):
        parts += ["## Next 下一步", "```bash\n" + "\n".join(report["next_commands"]) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _summary(report: dict[str, Any], stages: Sequence[dict[str, Any]]) -> str:
    last = stages[-1]["metrics"] if stages else {}
    figures = [f"{COLUMNS[key]} {_metric(key, last[key])}" for key in SUMMARY if last.get(key) is not None]
    ended = f" It ended at: {', '.join(figures)}." if figures else ""
    return f"Written {report['written']}. All stages together took {_seconds(report['seconds'])}.{ended}"


def _stage_table(stages: Sequence[dict[str, Any]], baseline: dict[str, Any]) -> str:
    """One row a stage; `a -> b` is before and after the stage."""
    columns = [key for key in COLUMNS if any(s["metrics"].get(key) is not None for s in stages)]
    rows = []
    if any(baseline.get(key) is not None for key in columns):
        name = "baseline: the answer of the most similar training question"
        rows.append([name, "", "", *(_metric(key, baseline.get(key)) for key in columns)])
    above: dict[str, Any] = {}
    for stage in stages:
        metrics, before = stage["metrics"], above | stage.get("before", {})
        cells = [_change(key, before.get(key), metrics.get(key)) for key in columns]
        tokens = f"{stage['tokens']:,}" if stage.get("tokens") else ""
        rows.append([stage["name"], _seconds(stage.get("seconds")), tokens, *cells])
        above |= {key: metrics[key] for key in COMPARED if metrics.get(key) is not None}
    return _table(["stage", "time", "tokens", *(COLUMNS[key] for key in columns)], rows)


AIMS = {">=": operator.ge, ">": operator.gt, "<": operator.lt}


def reached(value: float | None, aim: str) -> bool:
    """Is the figure what `>= 0.9`, `> 0` or `< 10` asks for?"""
    sign, number = aim.split()
    return value is not None and bool(AIMS[sign](round(value, 9), float(number)))  # .653 - .453 is .2


def after_rows(stages: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Stage, time, figure, value, what was wanted and whether it was reached: a row a figure."""
    rows = []
    for stage in stages:
        name, seconds = stage["name"], _seconds(stage.get("seconds"))
        for key, value in stage["metrics"].items():
            aim = stage["wanted"].get(key, "")
            mark = ("reached" if reached(value, aim) else "missed") if aim else ""
            rows.append(
                [name, seconds, FIGURES.get(key, key.replace("_", " ")), _figure(key, value), _aim(key, aim), mark]
            )
            name = seconds = ""
    return rows


def _figure(key: str, value: Any) -> str:
    """Shares in per cent, changes of shares in points, anything else as it is."""
    if value is None or key in PLAIN:
        return _figure_text(value)
    return f"{100 * value:+.1f} points" if _is_change(key) else f"{100 * value:.1f} %"


def _aim(key: str, aim: str) -> str:
    """The aim in the figure's unit."""
    if not aim or key in PLAIN:
        return aim
    sign, number = aim.split()
    return f"{sign} {100 * float(number):g} {'points' if _is_change(key) else '%'}"


def _is_change(key: str) -> bool:
    return "gain" in key or "change" in key


def _kind_table(kinds: dict[str, dict[str, float]]) -> str:
    """Exact match of the last stage by kind of question, a column a language."""
    languages = sorted(kinds, reverse=True)
    names = dict.fromkeys(kind for language in languages for kind in kinds[language])
    rows = [[n.replace("_", " "), *(f"{100 * kinds[x].get(n, 0):.0f} %" for x in languages)] for n in names]
    return _table(["kind of question", *languages], rows)


def _change(key: str, before: Any, after: Any) -> str:
    if after is None:
        return ""
    return f"**{_metric(key, after)}**" if before is None else f"{_metric(key, before)} → **{_metric(key, after)}**"


def _metric(key: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if key in PERCENT else _figure_text(value)


def _mark(sample: dict[str, Any]) -> str:
    if "expected" not in sample:
        return ""
    right = sample.get("correct", sample["answer"].strip() == str(sample["expected"]).strip())
    return "✓" if right else "✗"


def _figure_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_figure_text(v)}" for k, v in value.items())
    return str(value)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: object) -> str:
    """Text that cannot break the table: a model's answer may hold anything."""
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\r", "").replace("\n", "<br>")
