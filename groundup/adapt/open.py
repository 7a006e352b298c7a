"""A folder becomes a model that answers, whether it holds a model or an adapter that belongs to one elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch

from groundup.adapt.folder import CONFIG, base_of, is_adapter, load_adapter
from groundup.errors import UserError
from groundup.model.hub import resolve
from groundup.model.io import load_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer, load_tokenizer


def open_model(name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """`load_model` of a folder or a hub's name; of an adapter's folder: its base with the adapter in it.

    LoRA, (IA)^3 and soft prompts are merged; bottlenecks, which cannot be, stay beside their layers.
    """
    folder = resolve(name)
    if not is_adapter(folder):
        return load_model(folder, device, dtype)
    model = load_model(base_folder(folder), device, dtype)
    adapted = load_adapter(model, folder)
    if adapted.mergeable:
        adapted.merge()
    return model.eval()


def open_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a folder or a hub's name; of an adapter's folder that has none: its base's."""
    folder = resolve(name)
    if is_adapter(folder) and not (folder / "tokenizer.json").is_file():
        folder = base_folder(folder)
    return load_tokenizer(folder)


def base_folder(adapter: Path) -> Path:
    """Where the model of an adapter lies. UserError: it is not there any more."""
    base = base_of(adapter)
    try:
        return resolve(base)
    except UserError as error:
        fix = f'write where it lies now into {adapter / CONFIG} ("base_model_name_or_path"), or bring it there'
        raise UserError(adapter, f"belongs to the model {base}: {error.why}", fix) from None
