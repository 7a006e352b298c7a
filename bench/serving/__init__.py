"""The measured servers, one file each; every one is a main that answers requests by turns (bench/serving/rounds.py)."""
