"""`python -m bench.results`: `groundup quickstart --full` for several seeds, and its table with mean and spread.

docs/RESULTS.md is written anew from the reports, and nothing else is in it. A seed whose run is finished is not run
again; one that was cut off goes on.
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

FIRST = {"world_exact_en": "at least 0.8", "world_exact_zh": "at least 0.8"}  # after fine-tuning
HEAD = """# Results

What each stage adds on the built-in world: `groundup quickstart --full`, all seeds by one command,

```bash
{command}
```

on {machine}. Every seed is a world of its own (people, facts, held-out questions) and a model from random
weights; all figures are of held-out questions, pairs and sums. Spread is from the least to the most of the seeds. What
the stages do: [full.py](../groundup/quickstart/full.py); their settings:
[settings.py](../groundup/quickstart/settings.py).

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
    by_name = [{stage["name"]: stage for stage in report["stages"]} for report in reports]
    head = ["stage", "figure", "wanted", "mean", "spread", *(f"seed {seed}" for seed in seeds), "reached"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, stage in by_name[0].items():
        wanted = stage.get("wanted", FIRST if name == "sft" else {})
        for key, aim in wanted.items():
            values = [stages[name]["metrics"][key] for stages in by_name]
            reached = sum(holds(value, aim) for value in values)
            spread = f"{min(values):.3g} to {max(values):.3g}"
            cells = [name, key.replace("_", " "), aim, f"{statistics.mean(values):.3g}", spread,
                     *(f"{value:.3g}" for value in values), f"{reached} of {len(values)}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    seconds = " | ".join(f"seconds, seed {seed}" for seed in seeds)
    lines += ["", f"| stage | {seconds} |", "|---|" + "---|" * len(seeds)]
    for name, stage in by_name[0].items():
        if "seconds" in stage:
            lines.append(f"| {name} | " + " | ".join(f"{stages[name]['seconds']:.0f}" for stages in by_name) + " |")
    return HEAD.format(command=command, machine=where) + "\n".join(lines) + "\n"


def holds(value: float, aim: str) -> bool:
    """Does the value do what `at least 0.9`, `under 10 nats` or `over 0` asks?"""
    words = aim.split()
    if words[:2] == ["at", "least"]:
        return value >= float(words[2])
    return value > float(words[1]) if words[0] == "over" else value < float(words[1])


if __name__ == "__main__":
    main()
