"""What the serving bench was asked to do, and what it aims at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# name: its module in bench/serving
PROGRAMS = {
    "ours-fp32": "ours",
    "ours-int8": "ours",
    "transformers": "hf",
    "llamacpp-f32": "llamacpp",
    "llamacpp-q8": "llamacpp",
    "vllm": "vllm_cpu",
    "onnx": "onnx_genai",
    "ours-http": "ours_http",
}
OPTIONAL = ("ours-http",)  # measured when it is named
DEFAULT = tuple(name for name in PROGRAMS if name not in OPTIONAL)
FP32 = ("ours-fp32", "ours-http", "transformers", "llamacpp-f32", "vllm", "onnx")  # must say the same
LARGE = 50_000_000  # parameters: SmolLM2 has 135M, a quickstart model 1 to 5M
ROUNDS = {"large": 3, "small": 9}


@dataclass(frozen=True)
class Options:
    """rounds: turns that each program gets at each number of requests; 0: ROUNDS. prompt, new: tokens of a request."""

    work: Path
    programs: tuple[str, ...] = DEFAULT
    requests: tuple[int, ...] = (1, 8, 32)
    rounds: int = 0
    prompt: int = 128
    new: int = 128
    shared: int = 1000
    threads: int = 2
    eager: bool = False

    def turns(self, parameters: int) -> int:
        """A small model's turns are short, so it gets more of them."""
        return self.rounds or ROUNDS["large" if parameters >= LARGE else "small"]


@dataclass(frozen=True)
class Aim:
    """One program's tokens a second over another's, on models of that size, at that many requests."""

    large: bool
    requests: int
    ours: str
    peer: str
    at_least: float


AIMS = (
    Aim(True, 8, "ours-fp32", "llamacpp-f32", 1.0),
    Aim(True, 8, "ours-fp32", "transformers", 2.0),
    Aim(True, 1, "ours-fp32", "transformers", 1.8),
    Aim(True, 1, "ours-fp32", "onnx", 1.0),
    Aim(True, 8, "ours-int8", "llamacpp-q8", 1.0),
    Aim(False, 32, "ours-fp32", "transformers", 5.0),
)
SHARED_PREFIX = 5.0  # times sooner
REST_MB = 300.0  # beside weights and used blocks
