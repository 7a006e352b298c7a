"""How does a batch of work become logits? One row of tokens through the model, over the paged cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as Ids
from pathlib import Path

import torch
from torch import nn

from groundup.device import return_memory, use_huge_pages
from groundup.errors import UserError
from groundup.infer.adapters import Adapter, Rows, add_deltas, load_adapter
from groundup.infer.foreign import recompute
from groundup.infer.fused import fuse, product
from groundup.infer.graphs import DecodeGraphs
from groundup.infer.linear import head_scheme
from groundup.infer.paged import PagedCache, PagedRows
from groundup.infer.prefix import write_prefix
from groundup.infer.quality import QuantizedLinear
from groundup.infer.scheduler import Work
from groundup.model.foreign import Foreign
from groundup.model.prefix import SoftPrefix, prefix_length
from groundup.model.transformer import Transformer


class Runner:
    """A model and its cache. quantize: a scheme of linear.py for the matrices, or None."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int, quantize: str | None = None) -> None:
        weight = model.head_weight
        self.model, self.device, self.quantize = model, weight.device, quantize
        scratch = num_blocks  # one block more, for recorded steps to write nothing to
        foreign = isinstance(model, Foreign)
        self.cached = not foreign or model.servable
        blocks = num_blocks + 1 if self.cached else 0
        self.cache = PagedCache(model.config, blocks, block_size, weight.device, weight.dtype)
        self.graphs = DecodeGraphs(model, scratch) if weight.device.type == "cuda" and not foreign else None
        self.adapters: dict[str, Adapter] = {}
        self.prefix = 0  # virtual tokens that lie before every sequence's own
        self._rows: PagedRows | None = None
        self._fused = fuse(model, quantize)
        if self._fused is None and quantize:
            _replace_linears(model, quantize)
        with torch.no_grad():
            self._head = product(weight.detach(), None, head_scheme(quantize))
        return_memory()  # of the matrices that were joined, or quantised
        for matrix in (weight, *(self._fused.matrices if self._fused is not None else ())):
            use_huge_pages(matrix)

    def hidden(self, work: Ids[Work]) -> torch.Tensor:
        """Hidden states of all tokens of the work, piece after piece, [N, D]; their keys and values are stored."""
        if not self.cached:
            return recompute(self.model, work, self.device)
        ids = [token for item in work for token in item.tokens]
        tables = [item.sequence.blocks for item in work]
        starts, counts = [self.prefix + item.start for item in work], [len(item) for item in work]
        ids_N = torch.tensor(ids, device=self.device)
        self._rows = rows = PagedRows(self.cache, tables, starts, counts, self._adapted(work))
        if self._fused is not None:
            return self._fused.hidden(ids_N, rows)
        if self.graphs is not None and not rows.adapters and all(len(item) == 1 for item in work):
            return self.graphs.hidden(ids_N, rows)
        return self.model.hidden(ids_N[None], cache=rows)[0]

    def hold(self, prefix: SoftPrefix, blocks: Ids[int]) -> None:
        """From now on every sequence begins with this prefix, in these blocks."""
        write_prefix(self.cache, blocks, prefix)
        self.prefix = prefix_length(prefix)

    @torch.no_grad()
    def refresh(self, prefix_blocks: Ids[int]) -> None:
        """Take over new values of the parameters. The blocks read them where they are; a head may be made of several
        tensors (adapted, or with a bias), and a soft prompt lies in the cache."""
        if self.quantize:
            raise UserError("quantize", "a quantised model does not follow its parameters", "leave it out")
        self._head = product(self.model.head_weight.detach(), None, None)
        if self.model.soft_prefix:
            self.hold(self.model.soft_prefix, prefix_blocks)

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Let requests name this LoRA adapter. UserError where it does not fit the model."""
        adapter = load_adapter(name, path, self.model)
        if self._fused is None:  # the model's own blocks: each matrix adds what the rows' adapters say
            for layer in adapter.parts.keys() - {part for one in self.adapters.values() for part in one.parts}:
                layer.register_forward_hook(self._add_deltas)
        self.adapters[name] = adapter

    def _add_deltas(self, layer: nn.Module, inputs: tuple[torch.Tensor], out_1NE: torch.Tensor) -> torch.Tensor:
        assert isinstance(layer, nn.Linear)
        rows = self._rows.adapters if self._rows is not None else ()
        return add_deltas(out_1NE.flatten(0, -2), inputs[0].flatten(0, -2), [layer], rows).view_as(out_1NE)

    def _adapted(self, work: Ids[Work]) -> Rows:
        places: dict[str, list[int]] = {}
        at = 0
        for item in work:
            name = item.sequence.request.adapter
            if name is not None and name in self.adapters:  # a draft model has none
                places.setdefault(name, []).extend(range(at, at + len(item)))
            at += len(item)
        return [(self.adapters[name], torch.tensor(rows, device=self.device)) for name, rows in places.items()]

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, V] fp32."""
        return self._head(hidden_ND).float()


def _replace_linears(model: Transformer, scheme: str) -> None:
    """Every matrix of the blocks by its quantised twin, where the fused blocks cannot do it.

    UserError where that would be none; a warning where it is not nearly all (experts, whose matrices are one tensor).
    """
    blocks = list(model.blocks)
    total, done = sum(p.numel() for block in blocks for p in block.parameters()), 0
    for part in [part for block in blocks for part in block.modules()]:
        for name, child in list(part.named_children()):
            if type(child) is nn.Linear:
                done += child.weight.numel()
                setattr(part, name, QuantizedLinear(child, scheme))
    kind = model.config.model_type
    if not done:
        why = f"{kind} has no matrices of the kind that can be kept in {scheme}"
        raise UserError("quantize", why, "leave it out")
    if done < 0.9 * total:
        what = f"{done / total:.0%} of {kind}'s blocks can be kept in {scheme}, the rest stays as it is"
        warnings.warn(f"quantize: {what}", stacklevel=2)
