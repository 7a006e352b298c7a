"""The parts of `python -m bench.train`: each has `run(options, material) -> dict` and `show(result) -> Table`."""
