"""What may one request ask for, and what does it get back?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. The output of a request is a function of (weights, prompt, SamplingParams) alone.

    max_tokens: most new tokens; a request also ends at the model's context.
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off.
    min_p: least probability kept, as a share of the largest; 0 is off.
    repetition_penalty: 1 is off; over prompt and answer (Keskar et al. 2019, CTRL, section 4.1).
    seed: None draws a fresh one; equal seeds on equal prompts give equal text.
    stop: strings that end the answer and are left out of it. ignore_eos: go on past the stop tokens (for measuring).
    Raises UserError on a value out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = field(default_factory=tuple)
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        faults = [
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("stop", all(self.stop), "made of non-empty strings"),
        ]
        for name, fine, want in faults:
            if not fine:
                raise UserError(name, f"{getattr(self, name)!r} is out of range", f"it must be {want}")


@dataclass(frozen=True)
class Completion:
    """One answer. ids hold the stop token where one ended it; text does not. finish_reason: "stop" or "length"."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str


def params_from_dir(path: str | Path, **given: Any) -> SamplingParams:
    """The folder's own habits (generation_config.json), then what is given and not None.

    As in transformers, a folder that does not say do_sample answers greedily.
    """
    values: dict[str, Any] = {}
    file = Path(path) / "generation_config.json"
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(file, "is not valid JSON", "mend or remove it") from None
        if stored.get("do_sample"):
            defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers' own
            values = {name: stored[name] if stored.get(name) is not None else v for name, v in defaults.items()}
        if stored.get("repetition_penalty"):
            values["repetition_penalty"] = stored["repetition_penalty"]
    return SamplingParams(**(values | {name: value for name, value in given.items() if value is not None}))
