"""`python -m bench.peers install` makes the environments that peers need; without it, says which are there."""

from __future__ import annotations

import sys

from bench.peers.environments import install, litgpt_python

if sys.argv[1:] == ["install"]:
    raise SystemExit(install())
print(f"litgpt: {litgpt_python() or 'missing (python -m bench.peers install)'}")
