"""Imports point one way, down the table of docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import groundup

PACKAGE = Path(groundup.__file__).parent

# A room may import itself, errors, and the rooms named here. `cli` and `quickstart` stand on top of everything.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "config": set(),
    "device": set(),
    "tokenizer": {"files"},
    "data": {"tokenizer", "files"},
    "world": {"data", "files"},  # rows only: see test_the_world_takes_only_row_types
    "ops": {"device"},
    "model": {"ops", "files"},
    "adapt": {"model", "ops", "config", "files", "tokenizer"},
    "objectives": {"ops"},
    "optim": {"config"},
    "dist": {"model"},
    "infer": {"model", "adapt", "ops", "tokenizer", "data", "device"},
    "rewards": {"infer", "data", "tokenizer", "config"},
    "export": {"model", "tokenizer", "files", "device", "infer"},
    "plan": {"config", "device", "model", "adapt", "optim", "objectives", "ops", "data", "tokenizer", "files"},
    "train": {*"config device tokenizer data ops model adapt objectives optim dist infer plan files rewards".split()},
    "serve": {"infer", "tokenizer", "model", "adapt", "data", "device", "config"},
    "eval": {*"infer data model adapt tokenizer device world files objectives ops config rewards".split()},
}
TOP = {*"cli cli_eval cli_files cli_options cli_reason cli_rewards cli_show quickstart pipeline __init__".split()}


def imports_of(path: Path) -> set[str]:
    """First names below `groundup` that a file imports, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "groundup" else [node.module]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("groundup.")}
    return found - {"__version__"}


def test_imports_point_one_way() -> None:
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in TOP:
            continue
        assert room in MAY_IMPORT, f"{room} is a new room: say here and in docs/ARCHITECTURE.md what it may import"
        wrong = imports_of(path) - MAY_IMPORT[room] - {room, "errors"}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}: against the direction of the rooms"
        seen += 1
    assert seen > 40


def test_the_table_has_no_cycle() -> None:
    """A table that allowed a cycle would hold nothing."""
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {room for room, below in MAY_IMPORT.items() if room not in done and below <= done}
        assert ready, f"cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_importing_groundup_stays_light() -> None:
    """`import groundup` and the command line's help load no torch, transformers, datasets or pyarrow."""
    code = (
        "import sys, groundup, groundup.cli; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
