"""Safetensors in files of bounded size, written one after the other: memory holds one shard, never the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from groundup.files import write_json

MAX_SHARD_BYTES = 2 * 10**9


def write_shards(
    folder: Path, sizes: Mapping[str, int], make: Callable[[str], torch.Tensor], max_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write the tensors named in `sizes` (bytes each, in order) as transformers names them; returns the file names.

    make(name) supplies a tensor when its turn comes. A tensor larger than max_bytes gets a file of its own. One file is
    model.safetensors; several are model-00001-of-0000N.safetensors and an index.
    """
    shards = plan_shards(sizes, max_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, tensors in zip(names, shards, strict=True):
        save_file({name: make(name) for name in tensors}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return names


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, cut wherever the next tensor would take a file past max_bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
