"""How do several trainings make one model? Stages with a journal, each of which can be resumed."""
