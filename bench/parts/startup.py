"""How long until something happens: `groundup --help`, and the first training step of tiny from a cold process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.material import Material
from bench.measure import ROOT
from bench.options import Options
from bench.parts.presets import model_config
from bench.programs import program

TIMES = 5


def run(options: Options, material: Material, say: Callable[[str], None]) -> dict[str, Any]:
    """Medians of five. The first step counts from the process's start, with the text tokenised before."""
    help_seconds = [wall(help_command()) for _ in range(TIMES)]
    config = model_config("tiny", options)
    spec = options.base() | {
        "config": config, "model": material.model("tiny", config, options.shape), "rows_kind": "packed", "warmup": 1,
        "accumulate": 1, "compile": False,
    } | material.spec(material.text, config["vocab_size"])  # fmt: skip
    firsts = []
    for _ in range(max(1, min(options.rounds, 3))):
        one = program("ours", spec, {}).start()
        firsts.append(one.hello["start_seconds"])
        one.stop()
    say(f"startup: {statistics.median(help_seconds):.2f} s, {statistics.median(firsts):.1f} s")
    return {
        "startup": {"help_seconds": statistics.median(help_seconds), "first_step_seconds": statistics.median(firsts)}
    }


def help_command() -> list[str]:
    """The installed command where there is one."""
    script = Path(sys.executable).with_name("groundup")
    start = [str(script)] if script.exists() else [sys.executable, "-c", "from groundup.cli import main; main()"]
    return [*start, "--help"]


def wall(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def show(result: dict[str, Any]) -> Table:
    figures = result["startup"]
    table = Table("what", "seconds", title="Start-up")
    table.add_row("groundup --help", f"{figures['help_seconds']:.2f}")
    table.add_row("first training step of tiny", f"{figures['first_step_seconds']:.1f}")
    return table
