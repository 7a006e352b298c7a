"""What is a batch and a loss at this stage? `pretrain.py` and `sft.py`, then `loop.py`; `run.py` starts them.

The room itself may be called: `groundup.train(recipe)` is `groundup.train.run.train(recipe)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module named `train` hides any function of that name in the package, so the module is the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from groundup.train.run import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
