"""What is an answer worth? Plain functions `(prompts, completions, **columns) -> list[float]`. Open build.py first.

Nothing is imported here: a worker process that runs one function of a user need not load the others.
"""
