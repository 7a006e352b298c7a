"""How do the parts make one run? Open run.py."""
