"""How is this one step made fast? Each file reads: plain reference, fast path, chooser."""
