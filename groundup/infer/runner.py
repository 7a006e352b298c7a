"""How does a batch of work become logits? One row of tokens through the model, over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence as Ids

import torch
from torch import nn

from groundup.infer.fused import fuse, product
from groundup.infer.linear import make_linear
from groundup.infer.paged import PagedCache, PagedRows
from groundup.infer.scheduler import Work
from groundup.model.transformer import Transformer


class Runner:
    """A model and its cache. quantize: a scheme of linear.py for the matrices, or None."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int, quantize: str | None = None) -> None:
        weight = model.head_weight
        self.model, self.device = model, weight.device
        self.cache = PagedCache(model.config, num_blocks, block_size, weight.device, weight.dtype)
        self._fused = fuse(model, quantize)
        if self._fused is None and quantize:
            _replace_linears(model, quantize)
        with torch.no_grad():
            self._head = product(weight.detach(), None, quantize)

    def hidden(self, work: Ids[Work]) -> torch.Tensor:
        """Hidden states of all tokens of the work, one piece after another, [N, D]; their keys and values are stored."""
        ids = [token for item in work for token in item.tokens]
        tables = [item.sequence.blocks for item in work]
        starts, counts = [item.start for item in work], [len(item) for item in work]
        rows, ids_N = PagedRows(self.cache, tables, starts, counts), torch.tensor(ids, device=self.device)
        return self._fused.hidden(ids_N, rows) if self._fused else self.model.hidden(ids_N[None], cache=rows)[0]

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, V] fp32."""
        return self._head(hidden_ND).float()


class _Quantized(nn.Module):
    def __init__(self, layer: nn.Linear, scheme: str) -> None:
        super().__init__()
        self.product = make_linear(layer.weight.detach(), layer.bias, scheme)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.product(x_BTD.flatten(0, -2)).unflatten(0, x_BTD.shape[:-1])


def _replace_linears(model: Transformer, scheme: str) -> None:
    """Every matrix of the blocks by its quantised twin, where the fused blocks cannot do it."""
    for part in [part for block in model.blocks for part in block.modules()]:
        for name, child in list(part.named_children()):
            if type(child) is nn.Linear:
                setattr(part, name, _Quantized(child, scheme))
