"""Conversations as they come: real tokens a second, ours packed against Trainer padding to the longest of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from bench.material import Material
from bench.measure import ratio, speed, take_turns
from bench.options import Options
from bench.parts.presets import model_config
from bench.programs import start_all

MAX_LEN = 768
PADDED_ROWS = 16


def run(options: Options, material: Material, say: Callable[[str], None]) -> dict[str, Any]:
    """Useful tokens are real ones, context and trained alike; padding and filler do not count.

    Trainer takes 16 conversations a step. Ours takes as many packed rows of 768 as hold about as many real tokens.
    """
    name = "5m" if "5m" in options.presets else options.presets[0]
    config = model_config(name, options)
    max_len = min(MAX_LEN, options.seq_len) if options.shape else MAX_LEN
    vocab = config["vocab_size"]
    rows = material.chat_rows(vocab, max_len)
    packed = packed_rows_for(rows, max_len)
    say(f"sft: {name}, conversations of up to {max_len} tokens; {PADDED_ROWS} padded, or {packed} packed rows a step")
    own = {
        "config": config,
        "model": material.model(name, config, options.shape),
        "seq_len": max_len,
        "rows": str(rows),
        "rows_kind": "chats",
    }
    spec = options.base() | own | material.spec(material.chats, vocab)
    programs, missing = start_all(["ours"], spec | {"batch": packed}, options, say)
    try:
        if "trainer" in options.peers:
            found, missing = start_all(["trainer"], spec | {"batch": PADDED_ROWS}, options, say)
            programs += found
        take_turns(programs, options.rounds, options.seconds)
        trainer = programs[-1] if len(programs) > 1 else None
        useful = trainer.rounds[-1]["useful_share"] if trainer else None
        return {
            "ratio_vs_trainer_sft": ratio(programs[0], trainer) if trainer else None,
            "sft": {
                "preset": name,
                "useful_tokens_per_second": {p.name: speed(p) for p in programs},
                "useful_share": {p.name: p.rounds[-1]["useful_share"] for p in programs},
                "limit_of_packing": 1 / useful if useful else None,
                "memory_mb": {p.name: p.peak_mb for p in programs},
                "missing": missing,
            },
        }
    finally:
        for one in programs:
            one.stop()


def packed_rows_for(path: Any, max_len: int) -> int:
    """Full rows that hold as many tokens as 16 conversations do on average."""
    import numpy as np

    return max(1, round(PADDED_ROWS * float(np.load(path)["lengths"].mean()) / max_len))


def show(result: dict[str, Any]) -> Table:
    figures = result["sft"]
    table = Table("program", "useful tokens/s", "useful positions", "peak memory", title="Conversations as they come")
    for who, rate in figures["useful_tokens_per_second"].items():
        table.add_row(
            who, f"{rate:,.0f}", f"{figures['useful_share'][who]:.0%}", f"{figures['memory_mb'][who]:,.0f} MB"
        )
    if result["ratio_vs_trainer_sft"]:
        limit = figures["limit_of_packing"]
        table.caption = f"ours / Trainer {result['ratio_vs_trainer_sft']:.2f}; packing alone can give {limit:.2f}"
    return table
