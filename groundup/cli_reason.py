"""What can I type about reasoning? `groundup pipeline reason` and `groundup sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from groundup.cli_options import ModelDir, Think
from groundup.cli_show import Json, show

pipeline_app = typer.Typer(help="Several trainings in a row, from one recipe.", no_args_is_help=True)


@pipeline_app.command("reason")
def reason(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe: recipes/reason.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. grpo.train.steps=50")
    ] = None,
    as_json: Json = False,
) -> None:
    """Teach a chat model to think, as DeepSeek-R1 learnt it. The same command again goes on where it was."""
    from groundup.pipeline.reason import reason as run

    report = run(recipe, overrides or [])
    lines = [""]
    for stage in report["stages"]:
        figures = (f"{k.replace('_', ' ')} {v:.4g}" for k, v in stage["metrics"].items() if isinstance(v, float))
        lines.append(f"{stage['name']}: {', '.join(figures)}")
    show(report, as_json, "\n".join([*lines, *map("next: {}".format, report["next_commands"])]))


def sample(
    model: ModelDir,
    prompts: Annotated[list[str], typer.Argument(metavar="FILES...", help="Rows with a question and its answer.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Kept conversations, as jsonl.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")] = 4,
    keep: Annotated[int, typer.Option(min=1, help="Most answers kept of a prompt.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each file; default: all.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="NAME|FILE.py:function", help="What is right; default: by the format.")
    ] = None,
    least: Annotated[float, typer.Option(help="Sum of rewards from which an answer is right.")] = 1.0,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option()] = 0,
    think: Think = None,
    thought: Annotated[bool, typer.Option("--thought/--no-thought", help="Keep only answers that think.")] = True,
    least_language: Annotated[
        float, typer.Option(min=0, max=1, help="Share of words in the language of the question; 0: any.")
    ] = 0.9,
    most_repeated: Annotated[
        float, typer.Option(min=0, max=1, help="Share of runs of 6 words that were said before.")
    ] = 0.3,
    judged: Annotated[
        bool, typer.Option("--judged", help="Write all answers with their labels, too: for a verifier.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rejection sampling: answer prompts many times, keep what is right and readable. The same command resumes."""
    from groundup.config.reason import SampleConfig
    from groundup.config.rl import RewardSpec
    from groundup.pipeline.sample import sample_rows

    config = SampleConfig(
        n=n, keep=keep, limit=limit, max_tokens=max_tokens, temperature=temperature, top_p=top_p, enable_thinking=think,
        rewards=[RewardSpec(name=name) for name in reward or []], least=least, thought=thought,
        least_language=least_language, most_repeated=most_repeated, judged=judged,
    )  # fmt: skip

    def say(text: str) -> None:
        typer.echo(text, err=True)

    show(sample_rows(model, prompts, output, config, seed, say=say), as_json)
