"""How does a part of a reward model move, and how is what it became opened again? As PEFT's task SEQ_CLS has it: the
score head is trained whole and saved beside the adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from groundup.adapt.folder import CONFIG, is_adapter, load_adapter, read_adapter, read_config
from groundup.adapt.open import base_folder
from groundup.adapt.soft import PEFT_TYPES
from groundup.config import AdaptConfig
from groundup.errors import UserError
from groundup.files import write_json
from groundup.model.hub import resolve
from groundup.model.io import is_scorer, load_model
from groundup.model.scored import REWARD, Scored, load_scorer

TASK, LABELS = "SEQ_CLS", "score.json"  # the file: what the numbers of an adapter's score head mean


def with_score(settings: AdaptConfig) -> AdaptConfig:
    """The settings for a model that scores: its head moves, whatever else does. UserError: a method that cannot."""
    if settings.method in PEFT_TYPES:
        why = f"{settings.method} saves virtual tokens and nothing beside them, so not the score head"
        raise UserError("adapt.method", why, "use lora, ia3, bottleneck, freeze or full")
    return settings.model_copy(update={"save": [*settings.save, "score"]})


def write_labels(directory: str | Path, labels: Sequence[str]) -> None:
    """Beside an adapter's files, which have no place for it."""
    write_json(Path(directory) / LABELS, {"labels": list(labels)})


def is_scoring(directory: str | Path) -> bool:
    """Whether a folder holds a reward model, or an adapter that makes one."""
    if is_adapter(directory):
        return read_config(directory).get("task_type") == TASK
    return is_scorer(directory)


def open_scorer(name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Scored:
    """The reward model of a folder or a hub's name; of an adapter's folder its base with the adapter in it, merged."""
    folder = resolve(name)
    if not is_adapter(folder):
        return load_scorer(folder, device, dtype)
    if not is_scoring(folder):
        kind = read_config(folder).get("task_type")
        raise UserError(folder / CONFIG, f"its task_type is {kind}, not {TASK}", "name the adapter of a reward model")
    base = base_folder(folder)
    if is_scorer(base):
        scored = load_scorer(base, device, dtype)
    else:
        scored = Scored(load_model(base, device, dtype)).drop_head()
    tensors = read_adapter(folder)[1]
    heads = [t for key, t in tensors.items() if key.split(".")[2] == "score" and ".original_module." not in key]
    if len(heads) != 1:
        raise UserError(folder, "holds no score head", "train it again, or name another folder")
    if heads[0].shape != scored.score.weight.shape:
        why = f"its score head is {tuple(heads[0].shape)}, this model's would be {tuple(scored.score.weight.shape)}"
        raise UserError(folder, why, "use a reward model of one score, and the base that it was trained on")
    scored.labels = _labels(folder)
    adapted = load_adapter(scored, folder)
    if adapted.mergeable:
        adapted.merge()
    return scored.eval()


def _labels(folder: Path) -> tuple[str, ...]:
    if not (folder / LABELS).is_file():  # PEFT's own
        return (REWARD,)
    return tuple(json.loads((folder / LABELS).read_text(encoding="utf-8"))["labels"])
