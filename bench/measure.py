"""The side of the bench: start programs, let them take turns, ask the machine how busy it is and how fast."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ProgramFailed(Exception):
    """A measured program died; the text is the end of what it said."""


@dataclass
class Program:
    """One measured process: `python -m MODULE SPEC.json` (see turns.py), and what it answered so far."""

    name: str
    module: str
    spec: dict[str, Any]
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    hello: dict[str, Any] = field(default_factory=dict)

    def start(self) -> Program:
        """Start it and wait until it has warmed up."""
        self._files = ExitStack()
        folder = Path(self._files.enter_context(tempfile.TemporaryDirectory()))
        self._log = self._files.enter_context((folder / "log").open("w+"))
        spec = folder / "spec.json"
        spec.write_text(json.dumps(self.spec))
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [self.python, "-m", self.module, str(spec)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", **self.env},
        )  # fmt: skip
        self.hello = self._hear()
        self.hello["start_seconds"] = time.perf_counter() - began
        return self

    def turn(self, ask: float | str) -> dict[str, Any]:
        """Give it a turn: seconds to train for, or a line of what to answer. Its figures, and tokens_per_second."""
        self._process.stdin.write(f"{ask}\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        answer = self._hear()
        answer["tokens_per_second"] = answer["tokens"] / answer["seconds"]
        self.rounds.append(answer)
        return answer

    def stop(self) -> None:
        """Ask it to end; kill it where it does not."""
        try:
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait(30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._files.close()

    @property
    def peak_mb(self) -> float:
        """Peak memory: of the card where there is one, else of the process."""
        last = (self.rounds or [self.hello])[-1]
        return last.get("peak_cuda_mb", last["peak_mb"])

    def _hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read().strip().splitlines()[-8:] + [f"killed by signal {-code}"] * (code < 0)
        self.stop()
        raise ProgramFailed(f"{self.name}: " + "\n".join(tail))


def take_turns(
    programs: Sequence[Program], rounds: int, ask: float | Callable[[int], str], between: Any = None
) -> None:
    """A B C, A B C, ...: each round every program has one turn, in a rotating order; `between` runs once a round.

    ask: what a turn is told; or, of a round's number, what all are told in it.
    """
    for number in range(rounds):
        if between:
            between()
        told = ask(number) if callable(ask) else ask
        shift = number % len(programs)
        for program in [*programs[shift:], *programs[:shift]]:
            program.turn(told)


def ratio(ours: Program, peer: Program) -> float:
    """The median over rounds of ours / peer in tokens a second."""
    return statistics.median(
        a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours.rounds, peer.rounds, strict=True)
    )


def speed(program: Program) -> float:
    """Median tokens a second."""
    return statistics.median(r["tokens_per_second"] for r in program.rounds)


def load() -> list[float]:
    """Load averages of the last 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()]


class Watched(threading.Thread):
    """Peak memory of a process and all its children, sampled: `rss_mb` counts shared pages once a process, `pss_mb`
    shares them out (Linux)."""

    def __init__(self, pid: int, every: float = 0.1) -> None:
        super().__init__(daemon=True)
        self.pid, self.every, self.done = pid, every, threading.Event()
        self.rss_mb = self.pss_mb = 0.0
        self.start()

    def run(self) -> None:
        import psutil

        while not self.done.wait(self.every):
            try:
                root = psutil.Process(self.pid)
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            sizes = [_sizes(process) for process in family]
            self.rss_mb = max(self.rss_mb, sum(rss for rss, _ in sizes) / 2**20)
            self.pss_mb = max(self.pss_mb, sum(pss for _, pss in sizes) / 2**20)

    def stop(self) -> None:
        self.done.set()
        self.join()


def _sizes(process: Any) -> tuple[int, int]:
    """(RSS, PSS) in bytes; nothing for a process that has just ended."""
    import psutil

    try:
        rss = process.memory_info().rss
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        return rss, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (psutil.Error, OSError, StopIteration):
        return 0, 0
