"""Where does a run begin? A preset with fresh weights, a folder's model, one of a hub; whole, or a part of it tuned."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groundup.adapt.adapted import Adapted
from groundup.adapt.build import adapt
from groundup.adapt.folder import is_adapter, save_adapter
from groundup.adapt.open import open_tokenizer
from groundup.adapt.scored import with_score
from groundup.config import Recipe
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.foreign_config import ForeignConfig
from groundup.model.hub import is_hub_name, resolve
from groundup.model.io import describe, is_scorer, load_model, read_config, save_model
from groundup.model.presets import preset
from groundup.model.scored import begin_scored, load_scorer
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer, load_tokenizer

SOFT_METHODS = ("prompt", "p_tuning", "prefix", "p_tuning_v2")
SAMPLES, SAMPLE = 64, 1 << 16  # of each file of a base: enough to know it again


def source_of(recipe: Recipe) -> Path | None:
    """The folder of the recipe's model, fetched where it is a hub's; None for a preset."""
    if not (Path(recipe.model).exists() or is_hub_name(recipe.model) or "/" in recipe.model):
        preset(recipe.model)  # an unknown name is what to say first
        return None
    folder = resolve(recipe.model)
    if is_adapter(folder):
        fix = f"make a model of it first: groundup merge BASE {recipe.model} --output DIR"
        raise UserError(f"model={recipe.model}", "holds an adapter, not a model", fix)
    return folder


def tokenizer_of(recipe: Recipe, source: Path | None) -> Tokenizer:
    if recipe.tokenizer is None and source is None and recipe.distill.teacher is not None:
        return open_tokenizer(recipe.distill.teacher)  # a fresh student speaks as its teacher does
    if recipe.tokenizer is None and source is None:
        fix = "give tokenizer=DIR; make one with groundup tokenizer train FILES --output DIR"
        raise UserError("tokenizer", f"is missing, and the preset {recipe.model} has none of its own", fix)
    return load_tokenizer(recipe.tokenizer or source or "")


def config_of(recipe: Recipe, source: Path | None, tokenizer: Tokenizer) -> ModelConfig | ForeignConfig:
    """The model's shape, which must have room for the tokenizer's ids and the recipe's rows."""
    config = read_config(source) if source else preset(recipe.model, tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer={recipe.tokenizer or recipe.model}",
            f"has {tokenizer.vocab_size} tokens, the model {config.vocab_size}",
            "use the tokenizer that the model was trained with, or extend the model: groundup tokenizer extend",
        )
    virtual = recipe.adapt.tokens if recipe.adapt.method in SOFT_METHODS else 0
    room = config.max_position_embeddings - virtual
    if recipe.train.seq_len > room:
        beside = f", {virtual} of them the soft prompt's" if virtual else ""
        why = f"{recipe.train.seq_len} exceeds the model's {config.max_position_embeddings} positions{beside}"
        raise UserError("train.seq_len", why, f"use train.seq_len={room} or less")
    if source or not isinstance(config, ModelConfig):
        return config
    return replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)


@dataclass
class Start:
    """model: what stages compute with. adapted: the part of it that moves, where it is not the model itself. base:
    the folder or hub's name that the adapter will say it belongs to. fingerprint: what of the base must not change."""

    model: Any
    adapted: Adapted | None = None
    base: str = ""
    fingerprint: str = ""

    @property
    def rates(self) -> dict[str, float]:
        return self.adapted.rates() if self.adapted is not None else {}

    def numbers(self, moving: bool = True) -> int:
        """How many numbers move, or all that there are."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad or not moving)

    def save(self, folder: Path, tokenizer: Tokenizer) -> None:
        """A stock model folder; of an adapter PEFT's two files. The tokenizer beside it."""
        if self.adapted is None:
            save_model(self.model, folder)
        else:
            save_adapter(self.adapted, folder, self.base)
        tokenizer.save(folder)

    def whose(self) -> str:
        return describe(self.model if self.adapted is None else self.adapted.model)


def start(
    recipe: Recipe, config: ModelConfig | ForeignConfig, source: Path | None, tokenizer: Tokenizer, half: torch.dtype
) -> Start:
    """The model with fp32 masters of all that moves. half: the type of products, in which frozen matrices are kept."""
    model: Any
    if source is None:
        assert isinstance(config, ModelConfig)
        model = Transformer(config)
        model.init_weights(recipe.seed)
    else:
        scoring = recipe.stage == "reward" and is_scorer(source)
        model = (load_scorer if scoring else load_model)(source, dtype=torch.float32)
    settings = recipe.adapt
    if recipe.stage == "reward":
        model, settings = begin_scored(model, recipe.seed, recipe.reward.label), with_score(settings)
    adapted = adapt(model, settings, recipe.seed, tokenizer)
    if adapted is None:
        return Start(model)
    if source is None:
        raise UserError("adapt.method", f"the preset {recipe.model} knows nothing yet", "name a model folder")
    _keep_in(model.blocks, half)
    base = recipe.model if is_hub_name(recipe.model) else str(source.resolve())
    return Start(adapted.forward_model(), adapted, base, fingerprint(source))


def _keep_in(blocks: nn.Module, dtype: torch.dtype) -> None:
    """Frozen matrices in the type that autocast would make of them for every product."""
    for layer in blocks.modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(dtype)


def fingerprint(folder: Path) -> str:
    """Of a folder's weights: names, sizes and samples of the bytes. Reading all of a large base would take minutes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for at in sorted({0, *(size * i // SAMPLES for i in range(SAMPLES))}):
                file.seek(at)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
