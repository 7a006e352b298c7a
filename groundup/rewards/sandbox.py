"""How is a program run that nobody has read? In a process of its own that has given up nearly everything.

Time, memory and size of output are limited; there is no network, no other process, no file to write and, with
Landlock, none to read but Python's own (sandboxed/locks.py). A program that is killed, hangs, or floods its output
costs its time limit and no more. Works for ordinary users and within containers: nothing has to be installed or set up.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.errors import UserError

log = logging.getLogger(__name__)
RUN = Path(__file__).parent / "sandboxed" / "run.py"
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """seconds: of computing; twice that may go by on the clock. memory_mb: of address space. output_kb: written to
    standard output. disk_mb: the largest file it may write, to an empty folder of its own; 0: it writes none. locks:
    "kernel" where there are any, or "python", the audit hook alone (for tests)."""

    seconds: float = 5.0
    memory_mb: int = 512
    output_kb: int = 256
    disk_mb: int = 0
    locks: str = "kernel"

    def __post_init__(self) -> None:
        if not (0 < self.seconds < 86400 and self.memory_mb >= 64 and self.output_kb >= 1 and self.disk_mb >= 0):
            raise ValueError(f"{self} is out of range: seconds over 0, memory_mb 64 or more")


@dataclass(frozen=True)
class Outcome:
    """passed: a mark for each test. why: what went wrong first, "" if nothing did. output: what the program wrote.
    locks: what held it."""

    passed: list[bool] = field(default_factory=list)
    why: str = ""
    output: str = ""
    locks: str = ""


def run_tests(program: str, tests: Sequence[str], limits: Limits | None = None) -> Outcome:
    """Run a program, then each test (statements that raise where the program is wrong) in what it left behind."""
    limits, word = limits or Limits(), secrets.token_hex(8)
    output, why = _run("tests", program, json.dumps({"word": word, "tests": list(tests)}).encode(), limits)
    marks, held = {}, ""
    for line in output.decode(errors="replace").splitlines():
        said, _, rest = line.partition(" ")
        if said != word:
            continue
        number, mark, problem = [*rest.split(" ", 2), "", ""][:3]
        if number == "locks":
            held = problem
        else:
            marks[number], why = mark == "1", why or problem
    passed = [marks.get(str(i), False) for i in range(len(tests))]
    return Outcome(passed, why or ("" if all(passed) else "ended before its tests"), "", held)


def run_program(program: str, given: str, limits: Limits | None = None) -> Outcome:
    """Run a program that reads `given` as its standard input; passed is whether it came to its end."""
    output, why = _run("program", program, given.encode(errors="replace"), limits or Limits())
    return Outcome([not why], why, output.decode(errors="replace"))


@functools.cache
def check_locks(writing: bool = False) -> str:
    """What holds programs on this machine; said once where it is not the kernel. UserError where nothing does, or
    where a folder to write in could not be told from others."""
    if os.name != "posix":
        raise UserError("code", "programs can only be run safely on Linux and macOS", "use another reward")
    outcome = run_tests("", ["pass"])
    if not outcome.locks:
        raise UserError("code", f"the sandbox does not start ({outcome.why})", "see docs/rewards.md")
    if not outcome.locks.startswith("kernel"):
        log.warning("programs are held by Python's audit hook alone: no seccomp on this machine (docs/rewards.md)")
    if writing and "folders" not in outcome.locks:
        raise UserError("disk_mb", "this kernel has no Landlock, which keeps files apart", "leave disk_mb at 0")
    return outcome.locks


def _run(mode: str, program: str, rest: bytes, limits: Limits) -> tuple[bytes, str]:
    """(what the process wrote, why it is not to be trusted)."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if limits.disk_mb else None
        job: dict[str, Any] = {
            "mode": mode, "program": program, "cpu_seconds": math.ceil(limits.seconds), "memory_mb": limits.memory_mb,
            "disk_mb": limits.disk_mb, "folder": folder, "locks": limits.locks,
        }  # fmt: skip
        source = stack.enter_context(tempfile.TemporaryFile())
        source.write(json.dumps(job).encode() + b"\n" + rest)  # as a file, it never keeps us waiting
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-s", str(RUN)], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**ENVIRONMENT, "HOME": folder or "/", "TMPDIR": folder or "/"}, cwd=folder or "/",
            start_new_session=True,
        )  # fmt: skip
        try:
            return _follow(process, limits)
        finally:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


def _follow(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, str]:
    assert process.stdout
    end, output, handle = time.monotonic() + 2 * limits.seconds + 1, b"", process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(handle, selectors.EVENT_READ)
        while True:
            if not selector.select(max(end - time.monotonic(), 0)):
                return output, f"did not end within {limits.seconds:g} seconds"
            piece = os.read(handle, 1 << 16)
            if not piece:
                break
            output += piece
            if len(output) > limits.output_kb * 1024:
                return output[: limits.output_kb * 1024], f"wrote more than {limits.output_kb} KB"
    try:
        code = process.wait(max(end - time.monotonic(), 0.1))  # it may have closed its output and gone on
    except subprocess.TimeoutExpired:
        return output, f"did not end within {limits.seconds:g} seconds"
    return output, "" if code == 0 else f"ended with code {code}" + (" (killed)" if code < 0 else "")
