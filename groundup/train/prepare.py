"""What is put around a model from outside? Recomputation, then compilation; the data axis (dist/ddp.py) comes last."""

from __future__ import annotations

import functools
import os

from torch import nn
from torch.utils.checkpoint import checkpoint

from groundup.device import CompilePolicy
from groundup.train.folder import cache_folder


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Keep only each block's input in the forward pass and compute its inside again in the backward pass.

    Memory falls from all activations to one block's, for about a third more work (Chen et al. 2016).
    """
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(blocks: nn.ModuleList, policy: CompilePolicy) -> None:
    """Compile the repeated block, once for all layers; parameter names stay as they are. The code is kept on disk."""
    if policy.on:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        for block in blocks:
            block.compile()
