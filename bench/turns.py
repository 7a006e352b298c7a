"""The side of a measured program: train for some seconds when told to, then wait while the others have their turn.

Spoken over stdin and stdout, a line each. The bench writes seconds; the program answers one JSON object after its
warm-up and one after each turn; an empty line ends it. Only the standard library: peers in other environments use it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def claim_stdout() -> Any:
    """The real stdout for answers; whatever libraries print from now on goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return pipe


def peak_memory(pid: int | str = "self") -> float:
    """The most memory a process has held, in MB: VmHWM, which unlike ru_maxrss forgets what came before exec."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


class Turns:
    """Call `after_step` once a step; it counts, answers at the end of a turn, and blocks until the next one.

    warmup: first steps, which are not measured. device: "cuda" adds the card's peak memory and its clock.
    """

    def __init__(self, pipe: Any, warmup: int = 3, device: str = "cpu") -> None:
        self.pipe, self.warmup, self.cuda = pipe, warmup, device.startswith("cuda")
        self.born, self.steps, self.first_step = time.perf_counter(), 0, 0.0
        self.turn_tokens = self.turn_steps = 0
        self.begin = self.seconds = 0.0
        self.extra: dict[str, Any] = {}  # further figures that go with every answer

    def after_step(self, tokens: int) -> bool:
        """One more step of `tokens` is done. True: the bench wants no more, stop training."""
        self.steps += 1
        if self.steps == 1:
            self.first_step = self._now() - self.born
        if self.steps < self.warmup:
            return False
        if self.steps == self.warmup:
            self._now()
            return self._answer({"ready": True, "first_step": self.first_step})
        self.turn_tokens += tokens
        self.turn_steps += 1
        if time.perf_counter() - self.begin < self.seconds:
            return False
        seconds = self._now() - self.begin
        return self._answer({"tokens": self.turn_tokens, "steps": self.turn_steps, "seconds": seconds})

    def _now(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def _answer(self, words: dict[str, Any]) -> bool:
        memory: dict[str, float] = {"peak_mb": peak_memory()}
        if self.cuda:
            import torch

            memory["peak_cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
        self.pipe.write(json.dumps(words | memory | self.extra) + "\n")
        line = sys.stdin.readline().strip()
        if not line:
            return True
        self.turn_tokens = self.turn_steps = 0
        self.seconds, self.begin = float(line), time.perf_counter()
        return False


def run(make: Callable[[dict[str, Any], Turns], None], warmup: int = 3) -> None:
    """The main of a peer's module: `python -m bench.peers.NAME SPEC.json`."""
    pipe = claim_stdout()
    spec = json.loads(Path(sys.argv[1]).read_text())
    make(spec, Turns(pipe, spec.get("warmup", warmup), spec["device"]))
