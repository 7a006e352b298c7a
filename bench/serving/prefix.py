"""Two requests that begin with the same long text: how much sooner is the second one's first token there?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from rich.table import Table

from bench.measure import Program
from bench.serving.options import Options
from bench.serving.programs import Programs
from bench.serving.prompts import Prompts

REMEMBER = ("ours-fp32", "ours-int8", "llamacpp-f32", "llamacpp-q8", "vllm")  # programs that have such a cache
OWN = 16  # tokens that follow the shared ones


def run(programs: Programs, prompts: Prompts, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Alone on the machine, one after the other, a new shared text each round.

    {"shared": tokens, "first_ms", "second_ms", "ratios": {program: median of first / second}}.
    """
    context = programs.config["max_position_embeddings"]
    shared = min(options.shared, context - OWN - 8)
    say(f"{programs.folder.name}: two requests that share {shared} tokens")
    warmup = {"prompts": prompts.take(1, OWN), "new": 1, "cache": True}
    names = tuple(name for name in options.programs if name in REMEMBER)
    running = programs.start(names, 1, shared + OWN + 8, warmup)
    try:
        for number in range(max(3, options.turns(programs.parameters))):
            text = prompts.one(shared)
            asks = [json.dumps(warmup | {"prompts": [text + prompts.one(OWN)]}) for _ in range(2)]
            shift = number % max(1, len(running))
            for one in [*running[shift:], *running[:shift]]:
                for ask in asks:
                    one.turn(ask)
        return {"prefix": {"shared": shared} | figures(running)}
    finally:
        for one in running:
            one.stop()


def figures(running: list[Program]) -> dict[str, Any]:
    pairs = {
        one.name: [(a["ttft_p50"], b["ttft_p50"]) for a, b in zip(one.rounds[::2], one.rounds[1::2], strict=True)]
        for one in running
    }
    return {
        "first_ms": {name: statistics.median(a for a, _ in found) for name, found in pairs.items()},
        "second_ms": {name: statistics.median(b for _, b in found) for name, found in pairs.items()},
        "ratios": {name: statistics.median(a / b for a, b in found) for name, found in pairs.items()},
    }


def show(name: str, result: dict[str, Any]) -> Table:
    found = result["prefix"]
    table = Table("program", "first request, ms", "second, ms", "times sooner",
                  title=f"{name}: first token, {found['shared']} tokens shared")  # fmt: skip
    for who, times in found["ratios"].items():
        table.add_row(who, f"{found['first_ms'][who]:,.0f}", f"{found['second_ms'][who]:,.0f}", f"{times:.1f} x")
    return table
