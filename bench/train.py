"""`python -m bench.train`: training against its peers, in one run, in turns. A table for people, one JSON line last."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from bench.material import Material
from bench.measure import ProgramFailed, load
from bench.options import Options
from bench.parts import minutes, presets, sft, startup, tokenise

PARTS: dict[str, ModuleType] = {
    "presets": presets, "sft": sft, "minutes": minutes, "tokenise": tokenise, "startup": startup,
}  # fmt: skip
QUICK = {"rounds": 1, "seconds": 2.0, "minutes": 0.2, "megabytes": 5}
KEYS = ("presets", "ratio_vs_trainer_sft", "minutes_ratio")  # always there, null until measured


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts asked for. The result is the last line on stdout; --json-out is written after each part."""
    asked = parse(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        options = read_options(asked, Path(asked.work or scratch))
        try:
            return measure(asked.only, options, asked.json_out, console)
        except ProgramFailed as error:
            raise SystemExit(f"bench: {error}") from None


def measure(parts: Sequence[str], options: Options, json_out: Path | None, console: Console) -> dict[str, Any]:
    material = Material(options.work)
    result = json.loads(json_out.read_text(encoding="utf-8")) if json_out and json_out.exists() else {}
    for name in parts:
        console.print(f"[bold]{name}")
        before = load()
        found = PARTS[name].run(options, material, lambda text: console.print(text, markup=False))
        Console().print(PARTS[name].show(found))
        result = merged(result, found | {"runs": [about(name, options, material, before)]})
        if json_out:
            json_out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))
    return result


def about(part: str, options: Options, material: Material, before: list[float]) -> dict[str, Any]:
    """Where these figures come from."""
    from groundup.device import describe

    return {
        "part": part,
        "machine": describe(),
        "load_before": before,
        "load_after": load(),
        "data": material.source,
        "rounds": options.rounds,
        "seconds_a_turn": options.seconds,
        "dtype": options.dtype,
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """New figures over those of earlier pieces; presets and runs are joined."""
    both: dict[str, Any] = {**dict.fromkeys(KEYS), **old, **new}
    both["presets"] = {**(old.get("presets") or {}), **(new.get("presets") or {})}
    both["runs"] = [*old.get("runs", []), *new["runs"]]
    return both


def read_options(asked: argparse.Namespace, work: Path) -> Options:
    import torch

    from groundup.device import set_threads

    set_threads()
    given = {key: getattr(asked, key) for key in ("rounds", "seconds", "minutes", "megabytes")}
    chosen = (QUICK if asked.quick else {}) | {key: value for key, value in given.items() if value is not None}
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Options(
        work=work, presets=asked.presets, peers=asked.peers, tune=asked.tune, sweep=asked.sweep, device=device,
        dtype=asked.dtype or ("bf16" if device.startswith("cuda") else "fp32"),
        batch=asked.batch or (8 if device == "cpu" else 64), shape=asked.shape,
        seq_len=asked.seq_len, **chosen,
    )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = lambda text: tuple(part for part in text.split(",") if part)  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    add = parser.add_argument
    add("--only", type=names, default=tuple(PARTS), help=f"parts to run, of {', '.join(PARTS)}")
    add("--quick", action="store_true", help="one short round of everything: does it run, not how fast")
    add("--presets", type=names, default=Options.presets)
    add("--peers", type=names, default=Options.peers, help="trainer,litgpt; empty for ours alone")
    add("--tune", action="store_true", help="try each program's settings first and use its fastest")
    add("--sweep", action="store_true", help="minutes: the baseline at several learning rates, the best one counts")
    add("--rounds", type=int, help=f"turns for each program (default {Options.rounds})")
    add("--seconds", type=float, help=f"length of a turn (default {Options.seconds:g})")
    add("--minutes", type=float, help=f"training time of the quality baseline (default {Options.minutes:g})")
    add("--megabytes", type=int, help=f"size of the file to tokenise (default {Options.megabytes})")
    add("--dtype", choices=("fp32", "bf16"), help="for everybody; default bf16 on a GPU, fp32 on a CPU")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--batch", type=int, help="packed rows a step (default 8 on a CPU, 64 on a GPU)")
    add("--seq-len", type=int, default=Options.seq_len)
    add("--shape", type=json.loads, default={}, help="JSON that replaces config values of every preset (smoke tests)")
    add("--work", help="folder to keep tokenised data in between runs (default: a temporary one)")
    add("--json-out", type=Path, help="file that pieces of the bench are merged into")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.only if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    return asked


if __name__ == "__main__":
    main()
