"""How fast is it, and against what? Start with `python -m bench.train`; docs/SPEED.md explains the figures."""
