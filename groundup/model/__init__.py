"""What is computed? Open transformer.py first."""
