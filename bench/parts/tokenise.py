"""A large jsonl file to tokens: ours against `datasets.map` with as many processes; speed and memory of the tree."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.material import Material
from bench.measure import ROOT, ProgramFailed, Watched
from bench.options import Options

VOCABULARY = 6400
NAMES = ("ours", "datasets")


def run(options: Options, material: Material, say: Callable[[str], None]) -> dict[str, Any]:
    """One warm-free run each a round, in turns; at most three rounds. Each starts with an empty cache."""
    file = material.work / f"large-{options.megabytes}.jsonl"
    write_large(file, material.documents(), options.megabytes)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spec = {"file": str(file), "tokenizer": str(material.tokenizer_dir(VOCABULARY)), "workers": workers}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for number in range(max(1, min(options.rounds, 3))):
        for name in NAMES if number % 2 == 0 else reversed(NAMES):
            rounds[name].append(once(name, spec))
            say(f"tokenise: {name} {rounds[name][-1]['seconds']:.1f} s")
    size = file.stat().st_size / 1e6
    file.unlink()
    middle = lambda name, key: statistics.median(r[key] for r in rounds[name])  # noqa: E731
    pairs = list(zip(rounds["ours"], rounds["datasets"], strict=True))
    return {
        "tokenise": {
            "megabytes": size,
            "processes": workers,
            "ratio_vs_datasets": statistics.median(theirs["seconds"] / own["seconds"] for own, theirs in pairs),
            "ratio_vs_map_alone": statistics.median(theirs["map_seconds"] / own["seconds"] for own, theirs in pairs),
            **{
                name: {
                    "seconds": middle(name, "seconds"),
                    "mb_per_second": size / middle(name, "seconds"),
                    "rows_per_second": middle(name, "rows") / middle(name, "seconds"),
                    "tokens": middle(name, "tokens"),
                    "peak_rss_mb": max(r["rss_mb"] for r in rounds[name]),
                    "peak_pss_mb": max(r["pss_mb"] for r in rounds[name]),
                }
                for name in NAMES
            },
        }
    }


def write_large(path: Path, documents: list[str], megabytes: int) -> None:
    """Rows of one to three documents, chosen at random, until the file is as large as asked."""
    rng, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            text = "\n".join(rng.choices(documents, k=rng.randint(1, 3)))
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            written += len(line.encode())
            file.write(line)


def once(name: str, spec: dict[str, Any]) -> dict[str, float]:
    """One run in a process of its own, its whole tree watched."""
    cache = Path(tempfile.mkdtemp(dir=Path(spec["file"]).parent))
    job = cache / "spec.json"
    job.write_text(json.dumps(spec | {"cache": str(cache / "cache")}))
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "bench.peers.tokenise", name, str(job)]
    try:
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
            watched = Watched(process.pid)
            out, _ = process.communicate()
            watched.stop()
            if process.returncode:
                log.seek(0)
                raise ProgramFailed(f"{name}: {log.read()[-800:]}")
        return json.loads(out.splitlines()[-1]) | {"rss_mb": watched.rss_mb, "pss_mb": watched.pss_mb}
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def show(result: dict[str, Any]) -> Table:
    figures = result["tokenise"]
    table = Table("program", "seconds", "MB/s", "rows/s", "peak of the tree: RSS", "PSS",
                  title=f"Tokenising {figures['megabytes']:.0f} MB with {figures['processes']} processes")  # fmt: skip
    for name in NAMES:
        one = figures[name]
        table.add_row(name, f"{one['seconds']:.1f}", f"{one['mb_per_second']:.1f}", f"{one['rows_per_second']:,.0f}",
                      f"{one['peak_rss_mb']:,.0f} MB", f"{one['peak_pss_mb']:,.0f} MB")  # fmt: skip
    table.caption = (f"ours is {figures['ratio_vs_datasets']:.2f} x load_dataset + map, "
                     f"{figures['ratio_vs_map_alone']:.2f} x map alone")  # fmt: skip
    return table
