"""Which programs can run here, and with which settings each is fastest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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
    if not options.tune:
        return settings[0]
    return fastest(settings, lambda setting: program(name, spec, setting), options.seconds, say)[0]


def fastest(
    settings: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], Program], seconds: float,
    say: Callable[[str], None], *, unit: str = "tokens", turns: int = 2,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """(the fastest setting, what each gave), each tried alone. Where there is no choice, or none runs: the first."""
    tried: list[dict[str, Any]] = []
    for setting in settings if len(settings) > 1 else ():
        trial = make(setting)
        try:
            trial.start()
            rate = max(trial.turn(seconds)["tokens_per_second"] for _ in range(turns))
            trial.stop()
            tried.append({"setting": setting, "rate": rate, "memory_mb": trial.peak_mb})
            say(f"  {trial.name} {setting}: {rate:,.2f} {unit}/s, {trial.peak_mb:,.0f} MB")
        except ProgramFailed as error:
            tried.append({"setting": setting, "error": str(error)})
            say(f"  {trial.name} {setting} does not run: {str(error).splitlines()[-1]}")
    ran = [one for one in tried if "rate" in one]
    return max(ran, key=lambda one: one["rate"])["setting"] if ran else settings[0], tried


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
