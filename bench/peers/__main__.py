"""`python -m bench.peers install [litgpt] [onnx] [vllm] [trl-ppo]` makes the environments that peers need.

Without a name it makes litgpt's; without `install` it says which are there.
"""

from __future__ import annotations

import sys

from bench.peers.environments import ENVIRONMENTS, install, python_of

if sys.argv[1:2] == ["install"]:
    names = sys.argv[2:] or ["litgpt"]
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        raise SystemExit(f"no peer {unknown[0]}; there are {', '.join(ENVIRONMENTS)}")
    raise SystemExit(max(install(name) for name in names))
for name in ENVIRONMENTS:
    print(f"{name}: {python_of(name) or f'missing (python -m bench.peers install {name})'}")
