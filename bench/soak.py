"""`python -m bench.soak DIR`: does the server stay right and whole under load? A table, one JSON line, exit 1 if not.

Thousands of mixed requests at once, some hung up on and some wrong, on a cache too small for all of them. Afterwards:
every block is free, memory is where it was, every answer equals the one given alone, every wrong body got a 4xx, and a
SIGTERM in the middle of answers lets them finish.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.serving.client import Call, Refused, ServerProcess, free_port, get, post
from bench.serving.replies import Answer, BadReply, fault_of_error, streamed, whole
from bench.serving.traffic import TEXT, Plan, Traffic

STRETCHES = 32  # times that the longest requests are sent before the others
WARM_UP = 0.3  # share of the requests after which memory is looked at for the first time
GROWTH_MB, GROWTH = 32.0, 0.05  # what memory may grow from then on: the larger of both
TRIES, FEW_TRIES = 100, 5  # of a request that is turned away because the queue is full; of a wrong one
SHOWN = 5  # faults told in full
ANSWERS_AT_ONCE = 2  # full-length answers that the cache has room for
DRAINED = 96  # tokens of an answer in whose middle the SIGTERM comes


@dataclass
class Seen:
    """What happened to the requests so far."""

    answers: list[tuple[int, Answer]] = field(default_factory=list)  # (number of the body, answer)
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    rss_mb: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    asked = parse(arguments)
    result = soak(asked.model, asked.requests, asked.distinct, asked.at_once, asked.seed)
    Console().print(show(result))
    print(json.dumps(result, ensure_ascii=False))
    if not result["passed"]:
        raise SystemExit(1)
    return result


def soak(folder: Path, requests: int, distinct: int, at_once: int, seed: int) -> dict[str, Any]:
    """Everything, on a server of its own; see show() for what is in the result."""
    from groundup.tokenizer import load_tokenizer
    from groundup.world import World

    tokenizer = load_tokenizer(folder)
    context = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    texts = list(World(seed).documents(200))
    name = folder.resolve().name
    traffic = Traffic(texts, lambda text: len(tokenizer.encode(text)), context, name, seed, distinct)
    plans = traffic.plans(requests)
    blocks = -(-ANSWERS_AT_ONCE * traffic.longest // 16)
    port = free_port()
    began = time.perf_counter()
    server = ServerProcess(
        [sys.executable, "-m", "bench.serving.small_server", str(folder), str(port), str(blocks)], port
    )
    try:
        seen = load(server, plans, at_once)
        seconds = time.perf_counter() - began
        after = settled(server)
        rss = psutil.Process(server.process.pid).memory_info().rss / 2**20
        alone = given_alone(server, traffic, sorted({number for number, _ in seen.answers}))
        differing = compare(seen, alone, traffic)
        drained = drain(server, traffic)
    finally:
        status = server.stop()
    return verdict(seen, after, rss, differing, drained, status, seconds) | {"blocks": blocks, "requests": requests}


def load(server: ServerProcess, plans: list[Plan], at_once: int) -> Seen:
    """All requests, `at_once` under way at any time; before them the longest ones, so that memory has its size."""
    seen, process = Seen(), psutil.Process(server.process.pid)
    largest = sorted((plan for plan in plans if plan.kind == "bad"), key=lambda plan: len(str(plan.body)))[-2:]
    warm = int(len(plans) * WARM_UP)
    send = partial(one, server.address)
    with ThreadPoolExecutor(at_once) as pool:
        for plan, result in zip(largest * STRETCHES, pool.map(send, largest * STRETCHES), strict=True):
            note(seen, plan, result)
        results = pool.map(send, plans)
        for number, (plan, result) in enumerate(zip(plans, results, strict=True)):
            note(seen, plan, result)
            if number >= warm and (number - warm) % max(1, len(plans) // 50) == 0:
                seen.rss_mb.append(process.memory_info().rss / 2**20)
    return seen


def one(address: tuple[str, int], plan: Plan) -> Answer | str | None:
    """Send a request: its answer; None where it was hung up on, or rightly refused; else what is wrong, in words."""
    try:
        if plan.kind == "cancel":
            hung_up(address, plan)
            return None
        for number in range(TRIES):
            if plan.kind == "ask" and plan.streamed:
                try:
                    return streamed(post(address, plan.path, plan.body).events())
                except Refused as refused:
                    status, body, headers = refused.status, refused.body, {"retry-after": "1"}
            else:
                status, body, headers = post(address, plan.path, plan.body).read()
            if status == 429 and "retry-after" in headers and (plan.kind == "ask" or number < FEW_TRIES):
                time.sleep(0.2)  # the queue is full: later
                continue
            if plan.kind == "bad":
                fault = fault_of_error(status, body)
                return f"wrong body {str(plan.body)[:160]}: {fault}" if fault else None
            return whole(body) if status == 200 else f"status {status} for {plan.path}: {body[:200]}"
        return f"turned away {TRIES} times: {str(plan.body)[:160]}"
    except (OSError, ValueError, KeyError, BadReply) as error:
        return f"{type(error).__name__} on {plan.path}: {error}"


def hung_up(address: tuple[str, int], plan: Plan) -> None:
    """Go away in the middle: after some events, or some milliseconds into an answer in one piece."""
    call: Call = post(address, plan.path, plan.body)
    if plan.streamed:
        try:
            for number, _ in enumerate(call.events(), 1):
                if number >= plan.patience:
                    break
        except Refused:
            pass
    else:
        time.sleep(plan.patience)
    call.close()


def note(seen: Seen, plan: Plan, result: Answer | str | None) -> None:
    if isinstance(result, str):
        seen.faults.append(result)
        seen.counts["faults"] += 1
    elif result is not None:
        seen.answers.append((plan.number, result))
        seen.counts["answers streamed" if plan.streamed else "answers whole"] += 1
    else:
        seen.counts["hung up on" if plan.kind == "cancel" else "wrong bodies refused"] += 1


def settled(server: ServerProcess, seconds: float = 20.0) -> dict[str, float]:
    """The engine's gauges once nothing runs any more, or after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found = gauges(get(server.address, "/metrics")[1])
        if time.monotonic() > end or not (found["running"] or found["waiting"] or found["blocks_used"]):
            return found
        time.sleep(0.1)


def gauges(text: str) -> dict[str, float]:
    """groundup_NAME{...} VALUE lines of the Prometheus page, by NAME."""
    return {name: float(value) for name, value in re.findall(r"^groundup_(\w+)\{[^}]*\} ([-+.\deE]+)$", text, re.M)}


def given_alone(server: ServerProcess, traffic: Traffic, numbers: list[int]) -> dict[int, Answer | str]:
    """The answers to these bodies with nothing else on the server, each in one piece."""
    found: dict[int, Answer | str] = {}
    for number in numbers:
        path, body = traffic.bodies[number]
        answer = one(server.address, Plan("ask", path, body, number))
        found[number] = answer if answer is not None else "no answer"
    return found


def compare(seen: Seen, alone: dict[int, Answer | str], traffic: Traffic) -> list[str]:
    """What was answered otherwise under load, in words."""
    differing = []
    for number, answer in seen.answers:
        right = alone[number]
        if answer != right:
            body = json.dumps(traffic.bodies[number][1], ensure_ascii=False)[:300]
            differing.append(f"{body}\n  under load {str(answer)[:300]}\n  alone      {str(right)[:300]}")
    return differing


def drain(server: ServerProcess, traffic: Traffic) -> str | None:
    """SIGTERM while answers stream: what is wrong with them, or None."""
    length = min(DRAINED, traffic.longest)
    body = {"model": traffic.model, "prompt": "a", "max_tokens": length, "ignore_eos": True, "stream": True,
            "temperature": 0, "stream_options": {"include_usage": True}}  # fmt: skip
    calls = [post(server.address, TEXT, body).events() for _ in range(4)]
    try:
        begun = [[next(call)] for call in calls]
        server.process.terminate()
        answers = [streamed([*first, *call]) for first, call in zip(begun, calls, strict=True)]
    except (OSError, Refused, BadReply) as error:
        return f"{type(error).__name__}: {error}"
    for choices, tokens in answers:
        if choices[0][2] != "length" or tokens != length:
            return f"ended by {choices[0][2]} after {tokens} tokens"
    server.process.wait(60)
    return None


def verdict(
    seen: Seen,
    after: dict[str, float],
    rss: float,
    differing: list[str],
    drained: str | None,
    status: int,
    seconds: float,
) -> dict[str, Any]:
    begin = seen.rss_mb[0]
    may = max(GROWTH_MB, GROWTH * begin)
    checks = {
        "no request failed": not seen.faults,
        "no leaked block": not after["blocks_used"] and not after["running"] and not after["waiting"],
        "memory flat": rss - begin <= may,
        "every answer as given alone": not differing,
        "SIGTERM lets answers finish": drained is None and status == 0,
    }
    return {
        "passed": all(checks.values()),
        "checks": checks,
        "counts": dict(seen.counts) | {"differing": len(differing)},
        "blocks_used_after": after["blocks_used"],
        "preemptions": after.get("preemptions_total", 0.0),
        "cached_tokens": after.get("cached_tokens_total", 0.0),
        "generated_tokens": after.get("generated_tokens_total", 0.0),
        "rss_mb": {"after_warm_up": begin, "most": max(seen.rss_mb), "end": rss},
        "rss_mb_over_time": [round(each, 1) for each in seen.rss_mb],
        "seconds": seconds,
        "faults": [*seen.faults[:SHOWN], *differing[:SHOWN], *([f"SIGTERM: {drained}"] if drained else [])],
    }


def show(result: dict[str, Any]) -> Table:
    table = Table("check", "", title=f"Soak: {result['requests']:,} requests in {result['seconds']:.0f} s")
    for name, fine in result["checks"].items():
        table.add_row(name, "yes" if fine else "NO")
    table.add_section()
    for name, count in result["counts"].items():
        table.add_row(name, f"{count:,}")
    memory = result["rss_mb"]
    table.add_row("blocks in all / used at the end", f"{result['blocks']} / {result['blocks_used_after']:.0f}")
    table.add_row("answers pushed out and computed again", f"{result['preemptions']:,.0f}")
    table.add_row("memory after warm-up / most / end", " / ".join(f"{memory[k]:,.0f} MB" for k in memory))
    table.caption = "\n".join(result["faults"]) or None
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    add = parser.add_argument
    add("model", type=Path, metavar="DIR", help="a model folder")
    add("--requests", type=int, default=2000)
    add("--distinct", type=int, help="different bodies among them (default: a third of the requests)")
    add("--at-once", type=int, default=32, help="requests under way at any time")
    add("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    asked.distinct = asked.distinct or max(1, asked.requests // 3)
    return asked


if __name__ == "__main__":
    main()
