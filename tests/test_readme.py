"""Every command of both READMEs runs, in their order, on small files and with fewer steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
SHORTER = {
    r"--port 8000": "--port 0",
    r"--minutes \d+": "--minutes 0.02",
    r"train\.steps=\d+": "train.steps=2",
    r'"steps": 10': '"steps": 1',
}
MADE_BY_MAKE = {"make demo", "make test"}
# What only a CUDA machine with an index of its own can run, and the line that enters the environment.
LEFT_OUT = ("python3 -m venv", ".venv/bin/python -m pip install", "source ")


# tests/serve/test_page_browser.py opens it.
IN_A_BROWSER = "groundup ui"


def serve_and_stop(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """It says where it serves, and ends cleanly when told to."""
    with subprocess.Popen(arguments, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = ""
        while "http://" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        server.terminate()
        assert server.wait(60) == 0


def blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in body.splitlines()) for indent, body in found]


def commands(readme: str) -> list[str]:
    lines = (line.split("  #")[0].strip() for block in blocks(readme, "bash") for line in block.splitlines())
    return [line for line in lines if line and not line.startswith(LEFT_OUT)]


def shorter(text: str) -> str:
    for pattern, replacement in SHORTER.items():
        text = re.sub(pattern, replacement, text)
    return text


def test_both_languages_show_the_same_commands() -> None:
    assert commands(READMES[0]) == commands(READMES[1])
    assert len(commands(READMES[0])) > 10


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets(target: str) -> None:
    """`make -n` shows what would run: the environment from constraints.txt first, torch before all else."""
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("groundup quickstart" if target == "demo" else "pytest") in shown


def test_every_command_of_the_readme(tmp_path: Path) -> None:
    from groundup.world import World

    World(seed=0).write(tmp_path / "world", documents=200, chats=100, later=2)
    (tmp_path / "world" / "pretrain.jsonl").rename(tmp_path / "my_text.jsonl")
    (tmp_path / "world" / "sft.jsonl").rename(tmp_path / "my_chats.jsonl")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }

    def run(arguments: list[str]) -> str:
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(shlex.split("groundup quickstart --minutes 0.02 --output out/quickstart"))  # what make demo runs
    assert [s["name"] for s in json.loads((tmp_path / "out/quickstart/report.json").read_text())["stages"]] == [
        "tokenizer", "pretrain", "sft",
    ]  # fmt: skip
    for command in commands(READMES[0]):
        if command in MADE_BY_MAKE or command.startswith(IN_A_BROWSER):
            continue
        if command.startswith("groundup serve"):
            serve_and_stop(shlex.split(shorter(command)), tmp_path, environment)
            continue
        if command.startswith("groundup chat"):
            command = f"sh -c {shlex.quote(f'echo hello | {command}')}"
        run(shlex.split(shorter(command)))
    for block in blocks(READMES[0], "python"):
        run([sys.executable, "-c", shorter(block)])
