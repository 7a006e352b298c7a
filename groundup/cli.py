"""What can I type? Every command, thin: parse, call one function, print its result. Heavy imports wait inside."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from groundup.cli_eval import evaluate
from groundup.cli_files import data_app, distill_app, tokenizer_app
from groundup.cli_options import (
    LINE,
    Adapters,
    Budget,
    ModelDir,
    Quantize,
    StepEnd,
    Strategy,
    Temperature,
    Think,
    Verifier,
    typed,
)
from groundup.cli_reason import pipeline_app, sample
from groundup.cli_rewards import rewards_app
from groundup.cli_show import Json, show
from groundup.errors import UserError

app = typer.Typer(
    help="From raw text to a language model that talks. Start with: groundup quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(distill_app, name="distill")
app.add_typer(pipeline_app, name="pipeline")
app.add_typer(rewards_app, name="rewards")
app.command(name="eval")(evaluate)
app.command()(sample)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from groundup import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def quickstart(
    minutes: Annotated[
        float, typer.Option(help="Training time to a model that talks; everything else is derived from it.")
    ] = 10.0,
    data: Annotated[
        list[str] | None, typer.Option(help="Own files (any known format) instead of the built-in world.")
    ] = None,
    more_data: Annotated[
        list[str] | None, typer.Argument(metavar="[FILES]...", help="Further files of --data.")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Layers; default: what fits the budget.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option(help="Run folder. The same folder again goes on where it was.")] = Path(
        "out/quickstart"
    ),
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Then reward model, DPO, PPO, GRPO, distillation, votes: 15 minutes more. Works later, too."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Zero to chat: tokenizer, pretraining, fine-tuning, evaluation and a report, within a budget of minutes."""
    from groundup.quickstart.run import quickstart as run

    if more_data and not data:
        raise UserError(more_data[0], "unexpected argument", "give own files after --data")
    files = [*(data or []), *(more_data or [])]
    report = run(minutes=minutes, data=files, depth=depth, seed=seed, output=output, full=full)
    text = "\n".join(
        ["", *_summary(report), f"report: {output / 'report.md'}", *map("next: {}".format, report["next_commands"])]
    )
    show(report, as_json, text)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe, e.g. recipes/sft.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.steps=200")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train by a recipe. The same command again resumes a run that was cut off."""
    from groundup.train.run import train as run

    result = run(recipe, overrides or [])
    text = "already finished" if result.get("already_finished") else "finished"
    figures = ", ".join(f"{k} {v:.4g}" for k, v in result["metrics"].items() if isinstance(v, float))
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks
        return
    show(result, as_json, f"{text}: {result['output']} ({result['steps']} steps; {figures})")


@app.command()
def chat(
    model: ModelDir,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    seed: Annotated[int | None, typer.Option()] = None,
    think: Think = None,
    quantize: Quantize = None,
) -> None:
    """Talk to a model in the terminal. /help lists the commands there."""
    from groundup.serve.terminal import run_chat

    run_chat(
        model,
        system=system,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        seed=seed,
        think=think,
        quantize=quantize,
    )


@app.command()
def generate(
    model: ModelDir,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: one a line from standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts from a file of rows in any known format, or .txt lines.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    temperature: Temperature = None,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int | None, typer.Option()] = None,
    think: Think = None,
    strategy: Strategy = None,
    budget: Budget = 16,
    verifier: Verifier = None,
    step: StepEnd = LINE,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Answer prompts, for scripts."""
    from groundup.serve.script import Longer, run_generate

    if verifier and not strategy:
        raise UserError("--verifier", "judges the samples of a strategy", "give --strategy best-of-n, or leave it out")

    run_generate(
        model,
        prompts or [],
        file=file,
        raw=raw,
        temperature=0.0 if temperature is None and strategy is None else temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        seed=seed,
        think=think,
        longer=Longer(strategy, budget, verifier, typed(step)) if strategy else None,
        quantize=quantize,
        as_json=as_json,
    )


@app.command()
def serve(
    model: ModelDir,
    host: Annotated[str, typer.Option(help="0.0.0.0: for other machines, too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: the folder's name.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="GROUNDUP_API_KEY", help="Clients must send it.")] = None,
    adapter: Adapters = None,
    quantize: Quantize = None,
    draft: Annotated[
        str | None, typer.Option(metavar="DIR|ngram", help="A smaller model that guesses ahead, or ngram lookup.")
    ] = None,
    cache_gb: Annotated[
        float | None, typer.Option(min=0, help="Memory for keys and values; default: a quarter of what is free.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = 256,
    max_total_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of all requests at hand.")] = None,
    max_tokens_limit: Annotated[int | None, typer.Option(min=1, help="Most new tokens of a request.")] = None,
    request_timeout: Annotated[float | None, typer.Option(min=0, help="Seconds.")] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Web pages that may call; * for all.")] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long running requests may go on at the end.")] = 30,
    scorer: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A reward model beside it, for POST /score.")
    ] = None,
) -> None:
    """Serve a model over OpenAI's API; a reward model for POST /score. SIGTERM or Ctrl-C: running requests finish."""
    from groundup.serve.api import serve as run

    run(
        model,
        host=host,
        port=port,
        name=name,
        api_key=api_key,
        adapters=adapter or [],
        quantize=quantize,
        draft=draft,
        cache_gb=cache_gb,
        max_waiting=max_waiting,
        max_total_tokens=max_total_tokens,
        max_tokens_limit=max_tokens_limit,
        request_timeout=request_timeout,
        cors_origins=cors_origin or [],
        drain_seconds=drain_seconds,
        scorers=scorer or [],
    )


@app.command()
def ui(
    model: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A model folder; or give --url.")] = None,
    url: Annotated[str | None, typer.Option(help="A running OpenAI-compatible server instead of a folder.")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the page.")] = 8501,
    adapter: Adapters = None,
) -> None:
    """A chat page in the browser. Ctrl-C stops it and its server."""
    from groundup.serve.ui import ui as run

    run(model, url=url, host=host, port=port, adapters=adapter or [])


@app.command()
def export(
    model: ModelDir,
    to: Annotated[str, typer.Option(metavar="gguf|ollama|hf", help="llama.cpp's file, Ollama's folder, a stock one.")],
    output: Annotated[Path, typer.Option(metavar="PATH")],
    quant: Annotated[str | None, typer.Option(help="f32, f16, q8_0, q4_0; of hf: f32, f16, bf16.")] = None,
    max_shard_size: Annotated[float, typer.Option(min=0, help="Of a safetensors file of hf, GB.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Write a model for other programs, checked to be the same model."""
    from groundup.export.run import export as run

    show(run(model, to, quant, output, max_shard_bytes=int(max_shard_size * 1e9)), as_json)


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The model folder to make.")],
    as_json: Json = False,
) -> None:
    """Make a model folder of a GGUF file: weights dequantised, tokenizer and chat template included."""
    from groundup.export.from_gguf import import_gguf

    show(import_gguf(file, output), as_json)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The folder of the model that they were trained on.")],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="Adapter folders.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The model folder to make.")],
    as_json: Json = False,
) -> None:
    """Put adapters into their base: a plain model folder, checked to say the same."""
    from groundup.adapt.merge import merge as run

    show(run(base, [_weighted(text) for text in adapters], output), as_json)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="Pickled weights: .bin, .pth, .pt.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The model folder to make.")],
    config: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where config.json and tokenizer lie, if not beside."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a stock folder (safetensors) of pickled weights. Nothing in the pickle is run."""
    from groundup.model.convert import convert as run

    show(run(source, output, config), as_json)


@app.command()
def world(
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the files.")],
    seed: Annotated[int, typer.Option()] = 0,
    documents: Annotated[int, typer.Option(min=1, help="Pretraining documents.")] = 20000,
    as_json: Json = False,
) -> None:
    """Write the built-in world as files: pretraining text, chats, held-out questions, preferences, reasoning, tools."""
    from groundup.world import World

    counts = World(seed=seed).write(output, documents=documents)
    show(counts, as_json)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    as_json: Json = False,
) -> None:
    """Will it fit? Estimate the memory of a recipe, part by part, against what this machine has free."""
    from groundup.plan.memory import plan_recipe

    show(plan_recipe(recipe, overrides or []), as_json)


def _weighted(text: str) -> tuple[str, float]:
    """`DIR` or `DIR=0.5`."""
    path, sep, weight = text.rpartition("=")
    if not sep or Path(text).exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise UserError(text, f"{weight!r} is no weight", "write ADAPTER=0.5, or the folder alone") from None


def _summary(report: dict[str, Any]) -> list[str]:
    """A line a stage, the copying baseline first where there is one; a line a figure of what came after fine-tuning."""
    from groundup.eval.report import after_rows

    stages = [{"name": "copying baseline", "metrics": report["baseline"]}] if report["baseline"] else []
    lines = []
    for stage in [*stages, *(stage for stage in report["stages"] if "wanted" not in stage)]:
        figures = [f"{stage['seconds']:.0f} s"] if "seconds" in stage else []
        figures += [f"{stage['tokens']:,} tokens"] if stage.get("tokens") else []
        exact = {k[-2:]: v for k, v in stage["metrics"].items() if k.startswith("world_exact_")}
        figures += [f"exact match {name} {100 * value:.1f} %" for name, value in exact.items()]
        if "bits_per_byte" in stage["metrics"]:
            figures.append(f"{stage['metrics']['bits_per_byte']:.3f} bits per byte")
        lines.append(f"{stage['name']}: {', '.join(figures)}")
    for name, _, what, value, aim, mark in after_rows([stage for stage in report["stages"] if "wanted" in stage]):
        lines.append(f"{name:9} {what}: {value}" + (f" (wanted {aim}: {mark})" if aim else ""))
    return lines


def main() -> None:
    """Entry point: one line for every fault. Exit 2: the user's input; 130: Ctrl-C; 1: a fault of ours."""
    debug = "--debug" in sys.argv or bool(os.environ.get("GROUNDUP_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` closed the pipe: leave without a word
    except KeyboardInterrupt:
        print("stopped; the same command again goes on where it was", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        code = 2 if isinstance(error, UserError) else 1
        hint = "" if code == 2 else " (a fault of groundup's own: --debug shows the traceback)"
        text = str(error) if code == 2 else f"{type(error).__name__}: {error}"
        print(f"error: {' '.join(text.split())}{hint}", file=sys.stderr)
        if isinstance(error, UserError) and error.detail:
            print(error.detail, file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
