"""The measured programs, one file each; every one is a main that trains by turns (bench/turns.py)."""
