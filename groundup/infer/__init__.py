"""How do many requests share one model? Open generate.py first."""
