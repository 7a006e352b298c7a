"""What can I type about rewards? `groundup rewards try ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from groundup.cli_show import Json, show
from groundup.errors import UserError

rewards_app = typer.Typer(help="Functions that judge answers.", no_args_is_help=True)


@rewards_app.command("try")
def try_out(
    reward: Annotated[str, typer.Argument(metavar="NAME|FILE.py:function", help="A given reward, or one of your own.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows with prompt and completion, or conversations.")],
    args: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Its arguments, e.g. partial=0.1")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows that are read.")] = 100,
    as_json: Json = False,
) -> None:
    """What a reward says of the answers in a file: the best, the worst, and their mean."""
    from groundup.config.recipe import value_of
    from groundup.rewards.try_out import lines, try_reward

    given = {}
    for item in args or []:
        key, sep, text = item.partition("=")
        if not sep:
            raise UserError(item, "not a key=value pair", "write e.g. partial=0.1")
        given[key] = value_of(key, text)
    report = try_reward(reward, file, given, limit)
    show(report, as_json, "\n".join(lines(report)))
