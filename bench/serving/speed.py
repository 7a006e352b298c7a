"""N requests at once: tokens a second, time to the first token, time a token, memory; ours over everybody else's."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from rich.table import Table

from bench.measure import Program, ProgramFailed, ratio, take_turns
from bench.serving.options import AIMS, FP32, LARGE, REST_MB, Options
from bench.serving.programs import Programs
from bench.serving.prompts import Prompts

FIGURES = ("tokens_per_second", "ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95")


def run(programs: Programs, prompts: Prompts, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Every number of requests with fresh processes, so that its memory is its own. {requests: figures}."""
    levels = {}
    for requests in options.requests:
        say(f"{programs.folder.name}: {requests} at once")
        levels[str(requests)] = level(programs, prompts, options, requests)
    return {"requests": levels}


def level(programs: Programs, prompts: Prompts, options: Options, requests: int) -> dict[str, Any]:
    """One number of requests, all programs in turns; in a round all get the same prompts, each round new ones."""
    warmup = {"prompts": prompts.take(requests, options.prompt), "new": min(8, options.new), "cache": False}
    running = programs.start(options.programs, requests, options.prompt + options.new, warmup)
    try:

        def ask(number: int) -> str:
            return json.dumps(warmup | {"prompts": prompts.take(requests, options.prompt), "new": options.new})

        if running:
            take_turns(running, options.turns(programs.parameters), ask)
        return summary(running)
    except ProgramFailed as why:
        raise ProgramFailed(f"at {requests} requests: {why}") from None
    finally:
        for one in running:
            one.stop()


def summary(running: list[Program]) -> dict[str, Any]:
    """Medians over rounds; ratios are medians of the ratios within a round."""
    figures: dict[str, Any] = {
        name: {one.name: statistics.median(r[name] for r in one.rounds) for one in running} for name in FIGURES
    }
    ours = [one for one in running if one.name.startswith("ours")]
    peers = [one for one in running if one not in ours]
    return figures | {
        "memory_mb": {one.name: one.peak_mb for one in running},
        "resident_mb": {one.name: one.rounds[-1]["resident_mb"] for one in running},
        "ratios": {f"{a.name}/{b.name}": ratio(a, b) for a in ours for b in peers},
        "memory": {one.name: memory(one) for one in ours if "weights_mb" in one.rounds[-1]},
        "short": {one.name: short for one in running if (short := missing_tokens(one))},
        "agreement": agreement(running),
    }


def memory(program: Program) -> dict[str, float]:
    """What the peak of our process is made of, in MB."""
    last = program.rounds[-1]
    parts = {"weights": last["weights_mb"], "used_blocks": last["blocks_mb"]}
    return parts | {"rest": program.peak_mb - sum(parts.values()), "peak": program.peak_mb}


def missing_tokens(program: Program) -> int:
    """Tokens that were asked for and did not come: 0, or the comparison is not fair."""
    return max(r["wanted"] - r["tokens"] for r in program.rounds)


def agreement(running: list[Program]) -> dict[str, float]:
    """How far the first request's answer equals transformers' (else ours): share of tokens before the first difference.

    fp32 programs should say the same; one differing rounding changes the rest, so less than 1 now and then is normal.
    Rounds in which a server showed fewer ids than it counted (llama.cpp, inside a character) do not count.
    """
    exact = [one for one in running if one.name in FP32]
    base = next((one for one in exact if one.name == "transformers"), exact[0] if exact else None)
    shares = {
        one.name: [alike(a["ids"], b["ids"]) for a, b in zip(one.rounds, base.rounds, strict=True) if complete(a)]
        for one in exact
        if base is not None and one is not base
    }
    return {name: statistics.mean(found) for name, found in shares.items() if found}


def complete(answer: dict[str, Any]) -> bool:
    return len(answer["ids"]) * answer["requests"] == answer["wanted"]


def alike(ids: list[int], others: list[int]) -> float:
    length = min(len(ids), len(others))
    same = next((i for i in range(length) if ids[i] != others[i]), length)
    return same / max(len(ids), len(others), 1)


def aims(parameters: int, levels: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What this model is to reach, and whether it did; only what was measured."""
    found: dict[str, dict[str, Any]] = {}
    for aim in AIMS:
        got = levels.get(str(aim.requests), {}).get("ratios", {}).get(f"{aim.ours}/{aim.peer}")
        if got is not None and aim.large == (parameters >= LARGE):
            name = f"{aim.ours} / {aim.peer} at {aim.requests}"
            found[name] = {"wanted": aim.at_least, "got": got, "reached": got >= aim.at_least}
    for requests, figures in levels.items():
        rest = figures["memory"].get("ours-fp32", {}).get("rest")
        if rest is not None:
            name = f"MB beside weights and used blocks at {requests}"
            found[name] = {"wanted": REST_MB, "got": rest, "reached": rest <= REST_MB}
    return found


def show(name: str, result: dict[str, Any]) -> Table:
    table = Table("requests", "program", "tokens/s", "ours fp32 is", "ours int8 is", "first token p50 / p95, ms",
                  "a token p50 / p95, ms", "memory: peak / at the end", title=f"{name}: tokens out")  # fmt: skip
    for requests, figures in result["requests"].items():
        for who, rate in figures["tokens_per_second"].items():
            times = [figures["ratios"].get(f"{ours}/{who}") for ours in ("ours-fp32", "ours-int8")]
            table.add_row(
                requests, who, f"{rate:,.1f}", *(f"{x:.2f} x" if x else "" for x in times),
                f"{figures['ttft_p50'][who]:,.0f} / {figures['ttft_p95'][who]:,.0f}",
                f"{figures['tpot_p50'][who]:,.1f} / {figures['tpot_p95'][who]:,.1f}",
                f"{figures['memory_mb'][who]:,.0f} / {figures['resident_mb'][who]:,.0f} MB",
            )  # fmt: skip
        table.add_section()
    for who, why in result["missing"].items():
        table.add_row("", who, why.splitlines()[-1])
    return table
