"""What moves when not everything moves? Open lora.py first."""
