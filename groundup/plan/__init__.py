"""Will it fit, and how long does it take? memory.py answers the first, budget.py the second."""
