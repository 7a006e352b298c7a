"""How does a model of transformers remember as ours do? Its attention is ours for a while, over our Cache.

transformers lets its attention functions be replaced by name (AttentionInterface). Ours hands a layer's queries, keys
and values to `Cache.attend` and gives back the answers; who sees whom is the cache's business, so no mask is made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from groundup.model.cache import Cache, near
from groundup.ops.attention import attention

if TYPE_CHECKING:
    from groundup.model.foreign import Foreign

NAME = "groundup_cache"
_CACHE: ContextVar[tuple[Cache, Any]] = ContextVar(NAME)

# What transformers hands to an attention function that changes nothing here. Anything else that is set (a cap on the
# scores, sinks, a bias) would change the answer: a model that gives it cannot be computed over our cache.
HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "output_router_logits", "num_items_in_batch", "layer_idx", "cache_position",
}  # fmt: skip


class NotServable(Exception):
    """This model's attention is not what a cache computes."""


@contextmanager
def attend_through(cache: Cache, mask: Any, config: Any) -> Iterator[None]:
    """Inside, the attention of the model with this config goes through `cache`. mask: as cache.start gave it."""
    _register()
    before, token = config._attn_implementation, _CACHE.set((cache, mask))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _CACHE.reset(token)


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: Any,
    query_BHTd: torch.Tensor,
    key_BKTd: torch.Tensor,
    value_BKTd: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: answers [B, T, H, d]."""
    odd = next((name for name, value in more.items() if value is not None and name not in HARMLESS), None)
    if odd or is_causal is False:
        raise NotServable(odd or "is_causal")
    cache, mask = _CACHE.get()
    dim, wide = query_BHTd.shape[-1], value_BKTd.shape[-1]
    factor = 1.0 if scaling is None else scaling * dim**0.5  # our attention divides by sqrt(d)
    q_BTHd = query_BHTd.transpose(1, 2)
    if abs(factor - 1.0) > 1e-12:
        q_BTHd = q_BTHd * factor
    k_BTKd = key_BKTd.transpose(1, 2)
    v_BTKd = F.pad(value_BKTd, (0, dim - wide)).transpose(1, 2)
    window = {} if sliding_window is None else {"window": sliding_window}
    out_BTHd = cache.attend(module.layer_idx, q_BTHd, k_BTKd, v_BTKd, mask, **window)
    return out_BTHd[..., :wide], None


@torch.no_grad()
def shape_of_attention(model: Foreign, ids_1T: torch.Tensor) -> tuple[int, int] | None:
    """(key/value heads, head_dim) of every layer, if a cache can serve this model; else None.

    It can if each layer's attention comes through our function, once, all of one shape, with a window exactly where the
    config says so, and if the outcome is what the model computes by itself.
    """
    recorder = _Recorder(ids_1T.device)
    try:
        hidden_1TD = model.hidden(ids_1T, cache=recorder)
    except Exception:  # whatever a model does that does not expect another attention
        return None
    layers = model.config.num_hidden_layers
    if sorted(recorder.seen) != list(range(layers)) or recorder.calls != layers:
        return None
    shapes = {shape for shape, _ in recorder.seen.values()}
    windows = [window for _, (_, window) in sorted(recorder.seen.items())]
    if len(shapes) > 1 or windows != _windows(model.decoder.config, layers):
        return None
    return shapes.pop() if close(hidden_1TD, model.hidden(ids_1T)) else None


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same but for rounding. By means: a few giants among hidden states would hide all else in a maximum."""
    share = 5e-2 if b.dtype in (torch.bfloat16, torch.float16) else 1e-4
    a, b = a.double(), b.double()
    return bool((a - b).abs().mean() <= share * b.abs().mean())


def _windows(config: Any, layers: int) -> list[int | None] | None:
    """The window of each layer as the config tells it; None: it tells of something else."""
    size = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        size = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if size else "full_attention"] * layers
    if set(kinds) - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return None
    return [size if kind == "sliding_attention" else None for kind in kinds]


class _Recorder:
    """A cache that keeps nothing but the shape of what each layer gives it, and its window."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls = device, 0
        self.seen: dict[int, tuple[tuple[int, int], int | None]] = {}

    def start(self, new_tokens: int) -> tuple[torch.Tensor, Any]:
        return torch.arange(new_tokens, device=self.device)[None], None

    def attend(
        self,
        layer: int,
        q_BTHd: torch.Tensor,
        k_BTKd: torch.Tensor,
        v_BTKd: torch.Tensor,
        mask: Any,
        window: int | None = None,
    ) -> torch.Tensor:
        self.calls += 1
        self.seen[layer] = ((k_BTKd.shape[2], k_BTKd.shape[3]), window)
        if window is not None:
            mask = near(torch.arange(q_BTHd.shape[1], device=self.device)[None], q_BTHd.shape[1], window)
        return attention(q_BTHd, k_BTKd, v_BTKd, mask)

    def advance(self, new_tokens: int) -> None:
        """Nothing comes after."""
