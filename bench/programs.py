"""Which programs can run here, and with which settings each is fastest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from bench.measure import Program, ProgramFailed
from bench.options import MODULES, SETTINGS, Options
from bench.peers.environments import python_of


def available(peers: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """(programs that can run, why the others cannot). Ours comes first."""
    missing = {}
    if "litgpt" in peers and python_of("litgpt") is None:
        missing["litgpt"] = "not installed (python -m bench.peers install)"
    return ["ours", *(name for name in peers if name not in missing)], missing


def program(name: str, spec: dict[str, Any], setting: dict[str, Any]) -> Program:
    """One program at one setting, not yet started."""
    python = (python_of("litgpt") or sys.executable) if name == "litgpt" else sys.executable
    return Program(name, MODULES[name], spec | setting, python)


def best_setting(name: str, spec: dict[str, Any], options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """The fastest of the settings that are worth a try, each tried alone for two short turns."""
    settings = [s for s in SETTINGS[name] if spec["batch"] % s["accumulate"] == 0]
    if not options.tune or len(settings) == 1:
        return settings[0]
    rates = {}
    for number, setting in enumerate(settings):
        trial = program(name, spec, setting)
        try:
            trial.start()
            rates[number] = max(trial.turn(options.seconds)["tokens_per_second"] for _ in range(2))
            trial.stop()
            say(f"  {name} {setting}: {rates[number]:,.0f} tokens/s")
        except ProgramFailed as error:
            say(f"  {name} {setting} does not run: {str(error).splitlines()[-1]}")
    return settings[max(rates, key=rates.__getitem__)] if rates else settings[0]


def start_all(
    names: list[str], spec: dict[str, Any], options: Options, say: Callable[[str], None]
) -> tuple[list[Program], dict[str, str]]:
    """Start each program at its best setting. Returns those that run, and why the others do not."""
    running, failed = [], {}
    for name in names:
        try:
            running.append(program(name, spec, best_setting(name, spec, options, say)).start())
        except ProgramFailed as error:
            if name == "ours":
                raise
            failed[name] = str(error)
            say(f"  {error}")
    return running, failed
