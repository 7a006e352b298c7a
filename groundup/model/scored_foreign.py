"""How does a model that transformers computes score? Its trunk lies in two of transformers' classes, one at a time.

Foreign wants the class that writes, files want the one that classifies. The trunk inside is the same module.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from groundup.errors import UserError
from groundup.model.foreign import HALF, Foreign, quiet
from groundup.model.foreign_config import ForeignConfig
from groundup.model.io import save_stock, weight_files

if TYPE_CHECKING:
    from groundup.model.scored import Scored


def scoring_class(stock: Any) -> Any:
    """transformers' class of a scoring model with this config. UserError: there is none."""
    from transformers import AutoModelForSequenceClassification

    mapping = AutoModelForSequenceClassification._model_mapping
    if type(stock) not in mapping:
        why = f"transformers has no sequence classification for {stock.model_type}, so a reward model has no format"
        raise UserError("model", why, "use a Llama, Qwen, Gemma, Mistral, GPT-2 or OPT, for example")
    return mapping[type(stock)]


def load_foreign_scorer(
    directory: Path, config: ForeignConfig, labels: Sequence[str], device: torch.device, dtype: torch.dtype | None
) -> Scored:
    """A stock scoring folder of an architecture that is not ours. UserError: what is wrong with it."""
    from groundup.model.scored import Scored

    kind = scoring_class(config.stock)
    stored = getattr(torch, str(config.stock.dtype).removeprefix("torch."), None)
    if dtype is None and device.type == "cpu" and stored in (*HALF, torch.float64, None):
        dtype = torch.float32
    weight_files(directory)
    with quiet():
        try:
            loaded: Any = kind.from_pretrained(
                str(directory), dtype=dtype or "auto", local_files_only=True, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # a damaged file, a config that its own class refuses: many kinds
            raise UserError(directory, f"transformers cannot load it ({error})", "fetch the model again") from error
    classifier, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(directory, f"{len(missing)} tensors are missing, first {missing[0]}", "fetch the model again")
    writer: Any = config.build("meta")
    setattr(writer, writer.base_model_prefix, classifier.base_model)
    head = writer.get_output_embeddings()
    like = classifier.score.weight
    nothing = nn.Linear(head.in_features, head.out_features, bias=False, device=device, dtype=like.dtype)
    nn.init.zeros_(nothing.weight)
    writer.set_output_embeddings(nothing)
    trunk = Foreign(writer.to(device).requires_grad_(True).eval(), config, directory).try_out()
    scored = Scored(trunk, labels)
    scored.score = classifier.score.to(device)
    scored.pad_token_id = classifier.config.get_text_config().pad_token_id
    return scored.drop_head().requires_grad_(True).eval()


def save_foreign_scorer(scored: Scored, directory: Path) -> None:
    """transformers' own files."""
    from groundup.model.scored import label_names

    stock = copy.deepcopy(scored.config.stock)
    kind, names = scoring_class(stock), label_names(scored.labels)
    stock.id2label, stock.label2id = names["id2label"], names["label2id"]
    stock.get_text_config().pad_token_id = scored.pad_token_id
    with torch.device("meta"):
        classifier: Any = kind(stock)
    setattr(classifier, classifier.base_model_prefix, scored.trunk.inner.base_model)
    classifier.score = scored.score
    save_stock(classifier, directory)
