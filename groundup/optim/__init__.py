"""How do weights move? `muon.py` first, then `schedule.py` and `build.py`."""

from groundup.optim.build import Optimizers, build_optimizer
from groundup.optim.muon import Muon, orthogonalize
from groundup.optim.schedule import lr_factor, warmup_steps

__all__ = ["Muon", "Optimizers", "build_optimizer", "lr_factor", "orthogonalize", "warmup_steps"]
