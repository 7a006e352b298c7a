"""Other programs that make what the bench needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.measure import ROOT, ProgramFailed

GROUNDUP = (sys.executable, "-c", "from groundup.cli import main; main()")


def groundup(*words: str | Path) -> None:
    """One of our commands. ProgramFailed with the end of what it said."""
    command([*GROUNDUP, *map(str, words)], f"groundup {words[0]}")


def command(line: list[str], name: str) -> None:
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProgramFailed(f"{name}: " + "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:]))
