"""What can I type to measure a model? `groundup eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from groundup.cli_options import (
    LINE,
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
from groundup.cli_show import Json, show


def evaluate(
    model: ModelDir,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text or chats: bits per byte. Questions with answers: how many are answered right."),
    ] = None,
    world: Annotated[
        bool, typer.Option("--world", help="Exact match on the built-in world's held-out questions.")
    ] = False,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="The same on its held-out prompts that ask to think first.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the world that the model was trained on, and of samples.")] = 0,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before each question.")] = 0,
    cot: Annotated[bool, typer.Option("--cot", help="Chain of thought: ask to think step by step.")] = False,
    think: Think = None,
    strategy: Strategy = None,
    budget: Budget = 16,
    verifier: Verifier = None,
    step: StepEnd = LINE,
    temperature: Temperature = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; default: 256.")] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.py:function", help="What grades questions; default: their format.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each file.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only questions of --world of this kind.")] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where curves are drawn.")] = Path("out/eval"),
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Measure a model: bits per byte on files, right answers to questions, what thinking longer or quantising buys.

    With --strategy a curve of accuracy over 1, 2, 4, .. --budget samples is measured and drawn.
    """
    from groundup.eval.run import asking_of
    from groundup.eval.run import evaluate as run

    asking = asking_of(
        shots=shots, cot=cot, think=think, strategy=strategy, budget=budget, temperature=temperature,
        max_tokens=max_tokens, seed=seed, step=typed(step),
    )  # fmt: skip
    result = run(
        model, data=data or [], world=world, seed=seed, quantize=quantize, reasoning=reasoning, asking=asking,
        verifier=verifier, reward=reward, limit=limit, kinds=kind or (), output=output,
    )  # fmt: skip
    show(result, as_json)
