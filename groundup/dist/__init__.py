"""How is it spread? `mesh.py` (who is there), then one file an axis: `ddp.py`."""

from groundup.dist.ddp import spread, without_sync
from groundup.dist.mesh import World, start, stop

__all__ = ["World", "spread", "start", "stop", "without_sync"]
