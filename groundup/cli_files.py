"""What can I type about files? `groundup tokenizer ...`, `groundup data ...` and `groundup distill ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from groundup.cli_show import Json, show

tokenizer_app = typer.Typer(help="Train, extend and measure tokenizers.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data files, and clean them.", no_args_is_help=True)
distill_app = typer.Typer(
    help="Make students, and ask teachers of which only the text is to be had.", no_args_is_help=True
)

TokenizerDir = Annotated[Path | None, typer.Option("--tokenizer", metavar="DIR", help="A tokenizer folder.")]


@tokenizer_app.command("train")
def tokenizer_train(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Entries, special tokens included.")] = 6400,
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on files of any known format."""
    from groundup.data.texts import train_tokenizer_on

    show(train_tokenizer_on(files, vocab_size, output), as_json)


@tokenizer_app.command("extend")
def tokenizer_extend(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A tokenizer folder, or a model's.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="New text to learn pieces from.")],
    output: Annotated[Path, typer.Option(metavar="DIR")],
    add: Annotated[int, typer.Option(min=1, help="Pieces to add.")] = 8000,
    control: Annotated[
        list[Path] | None, typer.Option(help="Text of the old languages: reported beside the new.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add pieces learnt from new text to a tokenizer, and rows to its model; old ids stay."""
    from groundup.data.texts import extend_tokenizer_on

    whole = (base / "config.json").is_file()
    if whole:  # what is wrong with the model is said first
        from groundup.model.io import read_config

        read_config(base)
    summary, pieces = extend_tokenizer_on(base, files, add, output, control or [])
    if whole:
        from groundup.model.resize import resize_folder

        summary["model"] = resize_folder(base, output, summary["vocab_size"], pieces)
    show(summary, as_json)


@data_app.command("inspect")
def data_inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file, or FOLDER:NAME of a dataset_info.json.")],
    tokenizer: TokenizerDir = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows shown with their trained tokens coloured.")] = 3,
    as_json: Json = False,
) -> None:
    """Format, counts, lengths, and rows as the model sees them (trained tokens coloured)."""
    from groundup.data.inspect import inspect_file
    from groundup.tokenizer import load_tokenizer

    report = inspect_file(file, tokenizer=load_tokenizer(tokenizer) if tokenizer else None, samples=rows)
    if as_json:
        show(report.to_json(), True)
    else:
        report.print()


@data_app.command("clean")
def data_clean(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Kept rows, as jsonl.")],
    near_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Similarity of near duplicates; 0: exact only.")
    ] = 0.8,
    min_chars: Annotated[int, typer.Option(min=0)] = 1,
    max_chars: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 0,
    min_charset_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of letters, digits and CJK in a row.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Remove exact and near duplicates, and rows outside length or charset limits; report what went."""
    from groundup.data.clean import clean

    report = clean(
        files,
        output,
        near_threshold=near_threshold,
        min_chars=min_chars,
        max_chars=max_chars,
        min_charset_ratio=min_charset_ratio,
    )
    if as_json:
        show(report.to_json(), True)
    else:
        report.print()


@distill_app.command("cut")
def distill_cut(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A model folder.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The student's folder.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Text or chats that show what matters in the teacher.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Feed-forward neurons.")] = None,
    heads: Annotated[int | None, typer.Option(min=1)] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="The same shape with fresh weights.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
) -> None:
    """Cut a smaller model out of a teacher: a student that begins with something."""
    from groundup.train.cut import cut_folder

    cut = cut_folder(
        teacher, output, data or [],
        layers=layers, width=width, intermediate=intermediate, heads=heads, fresh=fresh, seed=seed,
    )  # fmt: skip
    show(cut, as_json)


@distill_app.command("ask")
def distill_ask(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPTS...", help="Files of rows in any known format, or .txt lines.")
    ],
    url: Annotated[str, typer.Option(help="An OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1")],
    model: Annotated[str, typer.Option(help="What the server calls the model.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Rows for stage sft, as jsonl.")],
    system: Annotated[str | None, typer.Option(help="System prompt, where a row has none.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    extra: Annotated[str, typer.Option(metavar="JSON", help="Further fields of each request.")] = "{}",
    parallel: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    retries: Annotated[int, typer.Option(min=0, help="Tries after the first, with growing pauses.")] = 6,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.")] = 600.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many prompts only.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent to the server.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a server every prompt; the answers become rows for stage sft. The same command again goes on."""
    from groundup.data.ask import Asking, Told, ask, json_object
    from groundup.data.ask_wire import Wire

    asking = Asking(model, system, temperature, top_p, max_tokens, seed, json_object("--extra", extra))
    wire = Wire(url, api_key, retries, timeout)
    show(ask(prompts, output, wire, asking, parallel, limit, progress=Told()), as_json)
