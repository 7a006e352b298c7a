"""How is it spread? `mesh.py` (who is there), then one file an axis: `ddp.py`."""

from groundup.dist.ddp import spread, without_sync
from groundup.dist.mesh import World, start

__all__ = ["World", "spread", "start", "without_sync"]
