"""What does a run leave behind? One folder: a stock model at its root, the recipe, the figures, the checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groundup.config import Recipe, load_recipe
from groundup.errors import UserError
from groundup.files import explain, write_atomic, write_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def cache_folder() -> Path:
    """Where groundup keeps what it can make again: $GROUNDUP_CACHE, else the user's cache folder."""
    chosen = os.environ.get("GROUNDUP_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundup"


class RunFolder:
    """The output folder of one run. Only rank 0 writes to it."""

    def __init__(self, output: str | Path) -> None:
        self.path = Path(output)
        self.checkpoints = self.path / "checkpoints"
        self.recipe, self.metrics, self.done = (self.path / n for n in ("recipe.yaml", "metrics.jsonl", "done.json"))

    @contextmanager
    def locked(self, main: bool = True) -> Iterator[None]:
        """One run a folder: its main rank holds a lock, which the system frees with the process, however that ends."""
        if not main:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("a")
        except OSError as error:
            raise explain(error, self.path) from error
        with handle:
            if not _lock(handle.fileno()):
                raise UserError(
                    self.path, "another process is training into it", "wait for it, or choose another output"
                )
            yield

    def check(self, recipe: Recipe) -> None:
        """UserError where the folder belongs to another recipe, or holds a model that the run would overwrite."""
        if not self.recipe.exists():
            if (self.path / "config.json").exists() or any((self.path / name).exists() for name in WEIGHTS):
                raise UserError(self.path, "holds a model already, which would be overwritten", "choose another output")
            return
        different = first_difference(load_recipe(self.recipe).identity(), recipe.identity())
        if different:
            key, before, now = different
            raise UserError(
                self.path,
                f"was started with {key}={before}, not {now}",
                "give the same recipe, or choose another output",
            )

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's, now that it is known to be sound."""
        if not self.recipe.exists():
            write_atomic(self.recipe, recipe.to_yaml())

    def result(self) -> dict[str, Any] | None:
        """What a finished run returned, or None."""
        if not (self.done.exists() and any((self.path / name).exists() for name in WEIGHTS)):
            return None
        try:
            return json.loads(self.done.read_text(encoding="utf-8"))
        except ValueError:
            return None  # the run ends again from its last checkpoint and writes it anew

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.done, result)

    def log(self, figures: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the lines after `step`, and one that a kill cut: the resumed run writes them again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_atomic(self.metrics, "".join(kept))


def first_difference(a: Any, b: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(dotted key, value in a, value in b) of the first place where two plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = ((f"{key}.{k}" if key else k, a.get(k), b.get(k)) for k in [*a, *(k for k in b if k not in a)])
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = ((f"{key}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        return None if a == b else (key, a, b)
    return next((found for found in (first_difference(x, y, k) for k, x, y in pairs) if found), None)


def _lock(handle: int) -> bool:
    """Take the file's lock without waiting."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
