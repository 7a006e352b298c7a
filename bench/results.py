"""`python -m bench.results`: `groundup quickstart --full` for several seeds, and its table with mean and spread.

docs/RESULTS.md is written anew from the reports. A seed whose run is finished is not run again; one that was cut off
goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import ROOT
from groundup.eval.report import FIGURES, reached

TUNED = {"world_exact_en": ">= 0.8", "world_exact_zh": ">= 0.8"}  # wanted of the fine-tuned model
HEAD = """# Results

What each stage adds on the built-in world: `groundup quickstart --full`, all seeds by one command,

```bash
{command}
```

on {machine}. Every seed is a world of its own (people, facts, held-out questions) and a model from random
weights ({parameters} parameters). All figures are of held-out questions, pairs and sums: what no training asks, though
pretraining text may tell it. Gains and changes are differences of shares; spread is from the least to the most of the
seeds, whose numbers of steps differ with the machine's speed at their start. What the stages do stands in
[full.py](../groundup/quickstart/full.py), their settings in
[settings.py](../groundup/quickstart/settings.py); these were chosen on these very seeds, most on
seed 0. The command goes on where it was: a stage may have been made anew, later than those before it.
GRPO and the votes begin with a copy of the fine-tuned model that has seen thoughts. The student's comparison has the
same start (cut out of the teacher), rows, order and steps, without the teacher's probabilities; both practise the
teacher's training questions about sums beside its conversations.

"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.results", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10.0, help="of pretraining and fine-tuning (default 10)")
    parser.add_argument("--output", type=Path, default=Path("out/results"), help="a folder a seed is made here")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "RESULTS.md")
    asked = parser.parse_args(arguments)
    reports = [run(seed, asked.minutes, asked.output) for seed in asked.seeds]
    command = f"python -m bench.results --seeds {' '.join(map(str, asked.seeds))} --minutes {asked.minutes:g}"
    asked.page.write_text(page(asked.seeds, reports, command), encoding="utf-8")
    print(asked.page)


def run(seed: int, minutes: float, output: Path) -> dict[str, Any]:
    """report.json of one seed, trained in a process of its own."""
    folder = output / f"seed-{seed}"
    command = [sys.executable, "-m", "groundup.cli", "quickstart", "--full", "--seed", str(seed)]
    subprocess.run([*command, "--minutes", f"{minutes:g}", "--output", str(folder)], check=True)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def page(seeds: Sequence[int], reports: Sequence[dict[str, Any]], command: str) -> str:
    machine = reports[0]["machine"]
    where = f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}"
    runs = [{stage["name"]: stage for stage in report["stages"]} for report in reports]
    each = [f"seed {seed}" for seed in seeds]
    figures = [["stage", "figure", "wanted", "mean", "spread", *each, "reached"]]
    sizes = [["stage", *(f"seconds, {seed}" for seed in each), *(f"steps, {seed}" for seed in each)]]
    for name, stage in runs[0].items():
        stages = [run[name] for run in runs]
        wanted = stage.get("wanted", TUNED if name == "sft" else {})
        for key in stage["metrics"] if "wanted" in stage else wanted:
            figures.append([name, *figure(key, wanted.get(key, ""), [one["metrics"][key] for one in stages])])
        sizes.append(
            [name, *(f"{one['seconds']:.0f}" for one in stages), *(str(one.get("steps", "")) for one in stages)]
        )
    parameters = ", ".join(f"{run['sft']['parameters']:,}" for run in runs)
    told = HEAD.format(command=command, machine=where, parameters=parameters)
    return told + f"{table(figures)}\n\n{table(sizes)}\n"


def figure(key: str, aim: str, values: Sequence[float | None]) -> list[str]:
    """Cells of one figure; one that was no number counts as missed."""
    known = [value for value in values if value is not None]
    spread = f"{min(known):.3g} to {max(known):.3g}" if known else ""
    mean = f"{statistics.mean(known):.3g}" if known else ""
    hits = f"{sum(reached(value, aim) for value in values)} of {len(values)}" if aim else ""
    cells = ("none" if value is None else f"{value:.3g}" for value in values)
    return [FIGURES.get(key, key.replace("_", " ")), aim, mean, spread, *cells, hits]


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    main()
