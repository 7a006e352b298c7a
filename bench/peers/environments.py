"""Peers that need an environment of their own: made beside the project, never inside its own."""

from __future__ import annotations

import subprocess
import sys

from bench.measure import ROOT

LITGPT = ROOT / ".venv-litgpt"
# litgpt wants numpy below 2; torch first, so that both sides run the same kernels and no CUDA build is pulled in.
STEPS = (["torch==2.13.0", "numpy<2"], ["litgpt>=0.5,<0.6", "torch==2.13.0", "numpy<2"])
LOOK = "import importlib.util, sys; sys.exit(importlib.util.find_spec('litgpt') is None)"


def litgpt_python() -> str | None:
    """The interpreter that has litgpt, or None."""
    python = LITGPT / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", LOOK], check=False).returncode:
        return None
    return str(python)


def install() -> int:
    """Make .venv-litgpt beside the project; its exit status is pip's."""
    subprocess.run([sys.executable, "-m", "venv", str(LITGPT)], check=True)
    for packages in STEPS:
        done = subprocess.run([LITGPT / "bin" / "python", "-m", "pip", "install", "-q", *packages], check=False)
        if done.returncode:
            print("litgpt did not install; the bench goes on without it", file=sys.stderr)
            return done.returncode
    return 0
