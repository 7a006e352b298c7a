"""Three model sizes on equal packed rows: tokens a second, share of the measured peak, peak memory, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich.table import Table

from bench.flops import flops_per_token, multiplied_parameters
from bench.material import Material
from bench.measure import Program, ratio, speed, take_turns
from bench.options import Options
from bench.programs import available, start_all

VOCABULARY = {"tiny": 2048}  # 1M parameters in all; the others have 6,400 entries


def run(options: Options, material: Material, say: Callable[[str], None]) -> dict[str, Any]:
    return {"presets": {name: measure(name, options, material, say) for name in options.presets}}


def model_config(name: str, options: Options) -> dict[str, Any]:
    """The preset in Hugging Face's words: every program builds the same shape from it."""
    from groundup.model.presets import preset

    return preset(name, VOCABULARY.get(name, 6400)).to_hf_dict() | dict(options.shape)


def measure(name: str, options: Options, material: Material, say: Callable[[str], None]) -> dict[str, Any]:
    from groundup.device import peak_flops

    config = model_config(name, options)
    vocab = config["vocab_size"]
    spec = (
        options.base()
        | {
            "config": config,
            "model": material.model(name, config, options.shape),
            "rows": str(material.packed_rows(vocab, options.seq_len, 64 * options.batch)),
            "rows_kind": "packed",
        }
        | material.spec(material.short_text, vocab)
    )
    names, missing = available(options.peers)
    size = multiplied_parameters(config) / 1e6
    say(f"{name}: {size:.1f}M parameters, {options.batch} x {options.seq_len} tokens a step")
    programs, failed = start_all(names, spec, options, say)
    peaks: list[float] = []
    try:
        peak = lambda: peaks.append(peak_flops.__wrapped__(options.device, options.dtype))  # noqa: E731
        take_turns(programs, options.rounds, options.seconds, between=peak)
        return summary(programs, config, options, peaks) | {"missing": missing | failed}
    finally:
        for one in programs:
            one.stop()


def summary(programs: list[Program], config: dict[str, Any], options: Options, peaks: list[float]) -> dict[str, Any]:
    """Figures of one preset; `ratio_vs_packed` and `memory_ratio` are against the best peer in each."""
    ours, *peers = programs
    flops = flops_per_token(config, options.seq_len)
    shares = {
        p.name: statistics.median(r["tokens_per_second"] * flops / k for r, k in zip(p.rounds, peaks, strict=True))
        for p in programs
    }
    ratios = {p.name: ratio(ours, p) for p in peers}
    return {
        "parameters": multiplied_parameters(config),
        "ratio_vs_packed": min(ratios.values(), default=None),
        "share_of_peak": shares["ours"],
        "memory_ratio": ours.peak_mb / min(p.peak_mb for p in peers) if peers else None,
        "ratios": ratios,
        "tokens_per_second": {p.name: speed(p) for p in programs},
        "shares_of_peak": shares,
        "memory_mb": {p.name: p.peak_mb for p in programs},
        "settings": {p.name: {k: p.spec[k] for k in ("accumulate", "compile")} for p in programs},
        "peak_gflops": statistics.median(peaks) / 1e9,
        "dtype": options.dtype,
        "batch": [options.batch, options.seq_len],
    }


def show(result: dict[str, Any]) -> Table:
    table = Table("preset", "program", "tokens/s", "ours is", "share of peak", "peak memory", "settings",
                  title="Equal packed rows")  # fmt: skip
    for name, figures in result["presets"].items():
        for who, rate in figures["tokens_per_second"].items():
            times = f"{figures['ratios'][who]:.2f} x" if who in figures["ratios"] else ""
            setting = ", ".join(f"{k} {v}" for k, v in figures["settings"][who].items() if v not in (False, 1))
            table.add_row(name, who, f"{rate:,.0f}", times, f"{figures['shares_of_peak'][who]:.0%}",
                          f"{figures['memory_mb'][who]:,.0f} MB", setting)  # fmt: skip
        for who, why in figures["missing"].items():
            table.add_row(name, who, why.splitlines()[-1])
        table.add_section()
    return table
