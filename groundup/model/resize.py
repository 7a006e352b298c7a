"""How does a model take a larger vocabulary? By more rows, each starting as the mean of those that spelled it before.

A word in pieces was read as those pieces, so their mean is near what the model knows of it (Gee et al. 2022, Fast
Vocabulary Transfer, arXiv:2402.09977). What it then still has to learn: recipes/continue-extended.yaml.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.errors import UserError
from groundup.model.config import read_json
from groundup.model.foreign import Foreign
from groundup.model.io import load_model, save_model
from groundup.model.transformer import Transformer

MULTIPLE = 64  # of rows: what GPUs multiply fast, and most embeddings have


@torch.no_grad()
def resize_embeddings(model: Transformer | Foreign, new_vocab_size: int, pieces: Mapping[int, Sequence[int]]) -> None:
    """Give `model` room for `new_vocab_size` ids, and the rows of `pieces` (id -> old ids) their mean as a start.

    Old rows stay as they are, bit by bit. An embedding with more rows than its tokenizer has ids is used up first; a
    larger one stays a multiple of 64 if it was one. An untied head, and its bias, gain the same rows. Rows that no
    piece asks for are the mean of all.
    UserError: a piece that lies outside.
    """
    old = model.config.vocab_size
    outside = [one for one, spelled in pieces.items() if one >= new_vocab_size or max([*spelled, 0]) >= old]
    if outside:
        why = f"id {outside[0]} lies outside the model's {old} rows, or is spelled with ids that do"
        raise UserError("vocabulary", why, "extend the tokenizer that the model was trained with")
    rows = max(old, new_vocab_size)
    if rows > old and old % MULTIPLE == 0:
        rows = -(-rows // MULTIPLE) * MULTIPLE
    if isinstance(model, Foreign):
        _grow_foreign(model, rows)
    else:
        _grow(model, rows)
    for weight in _by_token(model):
        weight[old:] = weight[:old].mean(0, dtype=torch.float32).to(weight.dtype)
        for number, spelled in pieces.items():
            weight[number] = weight[list(spelled)].mean(0, dtype=torch.float32).to(weight.dtype)


def _by_token(model: Transformer | Foreign) -> list[Tensor]:
    """The parameters that have a row a token, each once: the embedding, an untied head, its bias."""
    if isinstance(model, Foreign):
        head = model.inner.get_output_embeddings()
        found = [model.inner.get_input_embeddings().weight, head.weight, head.bias]
    else:
        found = [model.model.embed_tokens.weight, model.head_weight, None]
    return list({id(one): one for one in found if one is not None}.values())


def _grow(model: Transformer, rows: int) -> None:
    model.model.embed_tokens.weight = _longer(model.model.embed_tokens.weight, rows)
    model.model.embed_tokens.num_embeddings = rows
    if not model.config.tie_word_embeddings:
        model.lm_head.weight = _longer(model.lm_head.weight, rows)
        model.lm_head.out_features = rows
    model.config = replace(model.config, vocab_size=rows)


def _longer(weight: Tensor, rows: int) -> nn.Parameter:
    new = torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])
    return nn.Parameter(new, requires_grad=weight.requires_grad)


def _grow_foreign(model: Foreign, rows: int) -> None:
    if rows > model.config.vocab_size:
        model.inner.resize_token_embeddings(rows, mean_resizing=False)
        model.config = replace(model.config, vocab_size=rows, stock=model.inner.config)


def resize_folder(
    base: str | Path, output: str | Path, vocab_size: int, pieces: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """The model of `base`, resized for an extended tokenizer, beside that tokenizer in `output`, in the same precision.

    Returns {rows, rows_before, parameters}. UserError as load_model, save_model and resize_embeddings.
    """
    found = read_json(base)
    stored = getattr(torch, str(found.get("dtype") or found.get("torch_dtype")), None)
    model = load_model(base, dtype=stored if isinstance(stored, torch.dtype) else None)
    before = model.config.vocab_size
    resize_embeddings(model, vocab_size, pieces)
    save_model(model, output)
    settings = Path(base) / "generation_config.json"
    if settings.is_file():  # how its authors sample, and all of its stop tokens
        shutil.copyfile(settings, Path(output) / settings.name)
    rows = model.config.vocab_size
    return {"rows": rows, "rows_before": before, "parameters": sum(p.numel() for p in model.parameters())}
