"""The side of a measured server: answer some requests at once when told to, then wait while the others have their turn.

The pipe is that of turns.py, a line each. The bench writes {"prompts": [[ids]], "new": n, "cache": bool}; the program
answers one JSON object when it is ready and one after each round; an empty line ends it. Only the standard library:
peers in other environments use it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.turns import claim_stdout, peak_memory


class Watch:
    """When did the tokens of each request come? Starts at the moment when all requests are sent."""

    def __init__(self, requests: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(requests)]
        self.stamps: list[list[tuple[float, int]]] = [[] for _ in range(requests)]  # (seconds, tokens so far)
        self.began = time.perf_counter()
        self.seconds = 0.0

    def came(self, request: int, ids: Sequence[int], total: int | None = None) -> None:
        """Tokens of this request have just come. total: tokens so far, where the program counts more than it shows."""
        seconds = time.perf_counter() - self.began
        self.ids[request].extend(ids)
        so_far = len(self.ids[request]) if total is None else total
        if not self.stamps[request] or so_far > self.stamps[request][-1][1]:
            self.stamps[request].append((seconds, so_far))

    def spread(self, request: int, times: Sequence[float], total: int) -> None:
        """`total` tokens came in pieces at these times (perf_counter), nobody says how many in which: evenly."""
        self.stamps[request] = [(at - self.began, total * (i + 1) // len(times)) for i, at in enumerate(times)]

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.began

    def figures(self) -> dict[str, Any]:
        """tokens, seconds, and in milliseconds: ttft (to the first token of a request) and tpot (between its tokens).

        Tokens that come together share the time since the ones before. Percentiles are over all requests and tokens.
        """
        firsts = [1000 * stamps[0][0] for stamps in self.stamps]
        gaps = []
        for stamps in self.stamps:
            for (before, had), (now, has) in pairwise(stamps):
                gaps += [1000 * (now - before) / (has - had)] * (has - had)
        figures: dict[str, Any] = {"tokens": sum(stamps[-1][1] for stamps in self.stamps), "seconds": self.seconds}
        for name, values in (("ttft", firsts), ("tpot", gaps)):
            for share in (50, 95):
                figures[f"{name}_p{share}"] = percentile(values, share)
        return figures


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest, as numpy does; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Server:
    """What a peer's module supplies. It is made of the spec, and warmed up by a first round that nobody sees."""

    pid: int | str = "self"  # of the process whose memory counts

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    def answer(self, prompts: list[list[int]], new: int, cache: bool, watch: Watch) -> None:
        """Answer all prompts at once with exactly `new` greedy tokens each; tell the watch of every token.

        cache: whether prompts may be remembered from round to round.
        """
        raise NotImplementedError

    def extra(self) -> dict[str, Any]:
        """Further figures that go with the answer."""
        return {}

    def close(self) -> None:
        """End whatever outlives the process."""


def run(make: type[Server]) -> None:
    """The main of a peer's module: `python -m bench.serving.NAME SPEC.json`."""
    pipe = claim_stdout()
    spec = json.loads(Path(sys.argv[1]).read_text())
    server = make(spec)
    try:
        one_round(server, spec["warmup"])
        pipe.write(json.dumps({"ready": True, "peak_mb": peak_memory(server.pid)}) + "\n")
        while line := sys.stdin.readline().strip():
            pipe.write(json.dumps(one_round(server, json.loads(line))) + "\n")
    finally:
        server.close()


def one_round(server: Server, ask: dict[str, Any]) -> dict[str, Any]:
    """Answer, and the figures; `ids` are those of the first request, to see that all programs say the same."""
    watch = Watch(len(ask["prompts"]))
    server.answer(ask["prompts"], ask["new"], ask["cache"], watch)
    watch.stop()
    requests = len(ask["prompts"])
    about = {"requests": requests, "wanted": requests * ask["new"], "ids": watch.ids[0]}
    memory = {"peak_mb": peak_memory(server.pid), "resident_mb": resident_memory(server.pid)}
    return watch.figures() | about | memory | server.extra()


def resident_memory(pid: int | str) -> float:
    """What the process holds now, in MB: without what only its start needed. 0 where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)
