"""Which options do several commands share?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelDir = Annotated[Path, typer.Argument(metavar="DIR", help="A model folder (config.json, safetensors, tokenizer).")]
Quantize = Annotated[
    str | None, typer.Option(metavar="SCHEME", help="int8, int8-weight or int4: less memory, more speed.")
]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", metavar="NAME=PATH", help="A LoRA adapter.")]
Think = Annotated[bool | None, typer.Option("--think/--no-think", help="Default: the model decides.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy, the default; with --strategy it is .8.")]
Strategy = Annotated[
    str | None,
    typer.Option(metavar="majority|best-of-n|step-beam", help="Many samples a question, and a way to choose."),
]
Budget = Annotated[int, typer.Option(min=1, help="Samples a question, of --strategy.")]
Verifier = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A reward model that judges samples (majority: weighs votes).")
]
StepEnd = Annotated[str, typer.Option(metavar="TEXT", help="What ends a step of step-beam.")]
LINE = "\\n"  # as it is typed


def typed(text: str) -> str:
    """A line break that was typed as \\n."""
    return text.replace(LINE, "\n")
