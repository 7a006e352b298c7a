"""The process of a user's reward ends when its run does, however that ended, and not before."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from groundup.rewards.build import build_rewards

REWARDS = """
import re, time

calls = 0

def counts(prompts, completions, **columns):
    global calls
    calls += 1
    return [calls]

def sleeps(prompts, completions, **columns):
    print("called", flush=True)
    time.sleep(600)

def holds(prompts, completions, **columns):
    print("called", flush=True)
    re.match("(a+)+b", "a" * 60)  # no thread of its process runs until this ends
"""
RUN = """
import sys
from pathlib import Path
import psutil
from groundup.rewards.build import build_rewards

name, seconds = sys.argv[1], float(sys.argv[2])
rewards = build_rewards([f"mine.py:{name}"], Path.cwd(), seconds=seconds)
print(*(child.pid for child in psutil.Process().children()), flush=True)
if name != "counts":
    rewards([[]], ["said"], {})
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(REWARDS, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "seconds", "killed"),
    [("counts", 60, False), ("counts", 60, True), ("sleeps", 600, True), ("holds", 1, True)],
    ids=["the run leaves", "killed between calls", "killed in a call", "killed in a call that holds the interpreter"],
)
def test_it_ends_with_its_run(folder: Path, name: str, seconds: int, killed: bool) -> None:
    command = [sys.executable, "-c", RUN, name, str(seconds)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as run:
        assert run.stdin and run.stdout and run.stderr
        (worker,) = (psutil.Process(int(pid)) for pid in run.stdout.readline().split())
        if name != "counts":
            assert any(line == "called\n" for line in run.stderr)
        run.kill() if killed else run.stdin.close()
        run.wait(60)
        try:
            worker.wait(60)
        finally:
            if worker.is_running():
                worker.kill()


def test_signals_to_the_whole_group_are_the_runs_to_answer(folder: Path) -> None:
    before = set(psutil.Process().children())
    rewards = build_rewards(["mine.py:counts"], folder)
    try:
        (worker,) = set(psutil.Process().children()) - before
        assert rewards([[]], ["said"], {})[0] == [1]
        for ignored in (signal.SIGINT, signal.SIGTERM):
            worker.send_signal(ignored)
        assert rewards([[]], ["said"], {})[0] == [2], "the same process answers"
    finally:
        rewards.close()
    assert not worker.is_running()
