"""What stands before every request? The keys and values of a soft prompt, in blocks that all sequences begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from groundup.errors import UserError
from groundup.infer.paged import PagedCache
from groundup.model.prefix import SoftPrefix, prefix_length, record
from groundup.model.transformer import Transformer


def write_prefix(cache: PagedCache, blocks: Sequence[int], prefix: SoftPrefix) -> None:
    """Put the prefix where these blocks lie; its last block may stay half empty."""
    size = cache.block_size
    for layer, (keys_nKd, values_nKd) in enumerate(prefix):
        for held, new_nKd in ((cache.keys[layer], keys_nKd), (cache.values[layer], values_nKd)):
            for block, part_SKd in zip(blocks, new_nKd.split(size), strict=True):
                held[block, :, : len(part_SKd)] = part_SKd.transpose(0, 1).to(held)


def check_prefix(model: Transformer) -> int:
    """Virtual tokens before every request; 0 without a soft prompt. UserError: they leave no room in the context."""
    n, context = prefix_length(model.soft_prefix), model.config.max_position_embeddings
    if n >= context - 1:
        raise UserError("soft prompt", f"{n} tokens leave no room in the model's context of {context}", "train fewer")
    return n


@torch.no_grad()
def draft_prefix(model: Transformer, tokens: int) -> SoftPrefix:
    """What a draft model has in the places of a soft prompt that is not its own: the start of a text, repeated."""
    if prefix_length(model.soft_prefix) == tokens and model.soft_prefix:
        return model.soft_prefix
    if not isinstance(model, Transformer):
        raise UserError(
            "draft", "a model that transformers computes cannot draft for one with a soft prompt", "use ngram"
        )
    start = model.config.bos_token_id or 0
    return record(model, model.model.embed_tokens.weight[[start] * tokens])
