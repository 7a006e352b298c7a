"""How does a student begin with something of its teacher? As a smaller model cut out of it (model/cut.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from groundup.adapt.open import open_model, open_tokenizer
from groundup.data.read import read_rows
from groundup.data.rows import Chat, Text
from groundup.device import pick_device, set_threads
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.cut import Tokens, cut, smaller
from groundup.model.io import describe, save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer

ROWS = 8  # documents looked at together


def cut_folder(
    teacher: str | Path,
    output: str | Path,
    data: Sequence[str | Path] = (),
    *,
    layers: int | None = None,
    width: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    tokens: int = 16384,
    fresh: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """A smaller model of the teacher's kind in a folder of its own, with its tokenizer.

    data: text or chats, whose first `tokens` tokens show what matters in the teacher. fresh: the same shape with fresh
    weights instead, which needs no data. UserError: a model that transformers computes, sizes that are no part of the
    teacher's, a folder that holds a model, no text or chat in the files.
    """
    output = Path(output)
    if any((output / name).exists() for name in ("config.json", "model.safetensors")):
        raise UserError(output, "holds a model already", "choose another output")
    set_threads()
    tokenizer, model = open_tokenizer(teacher), open_model(teacher, pick_device(device))
    if not isinstance(model, Transformer):
        raise UserError(teacher, f"{describe(model)}, so it cannot be cut", "use a fresh student")
    config = smaller(cast(ModelConfig, model.config), layers, width, intermediate, heads)
    if fresh:
        small = Transformer(config)
        small.init_weights(seed)
    else:
        small = cut(model, config, _batches(data, tokenizer, config.max_position_embeddings, tokens, model))
    save_model(small.float(), output)
    tokenizer.save(output)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (small, model)]
    return {"output": str(output), "parameters": sizes[0], "share": round(sizes[0] / sizes[1], 4)}


def _batches(
    files: Sequence[str | Path], tokenizer: Tokenizer, context: int, tokens: int, model: Transformer
) -> Iterator[Tokens]:
    """The first documents of the files, as many of each, a few side by side."""
    if not files:
        raise UserError("data", "is missing", "give a file of text or chats, for example what the student will learn")
    waiting: list[list[int]] = []
    for file in files:
        taken = 0
        for row in read_rows(file):
            if isinstance(row, Chat):
                ids = tokenizer.render(row.messages, row.tools).ids
            elif isinstance(row, Text):
                ids = [tokenizer.bos_id, *tokenizer.encode(row.text), tokenizer.eos_id]
            else:
                raise UserError(file, f"holds rows of kind {type(row).__name__}", "give text or chats")
            waiting.append(ids[: min(context, 1024)])
            taken += len(waiting[-1])
            if len(waiting) == ROWS:
                yield _side_by_side(waiting, model.head_weight.device)
                waiting = []
            if taken * len(files) >= tokens:
                break
    if waiting:
        yield _side_by_side(waiting, model.head_weight.device)


def _side_by_side(documents: list[list[int]], device: torch.device) -> Tokens:
    longest = max(map(len, documents))
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in documents], device=device)
    lengths_B1 = torch.tensor([[len(ids)] for ids in documents], device=device)
    places_BT = torch.arange(longest, device=device).expand(len(documents), -1)
    return ids_BT, places_BT, torch.where(places_BT < lengths_B1, 0, -1).to(torch.int32)
