"""How good is it? A model whose head gives one number a token instead of a score for every next token.

A reward model reads the number of an answer's last token; the value model of PPO reads all of them. The head is a
matrix [labels, D] over the hidden states after the last norm, the same that a language model's head reads. On disk it
is transformers' `...ForSequenceClassification`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from groundup.errors import UserError
from groundup.files import explain, write_json
from groundup.model.config import ModelConfig, read_json
from groundup.model.foreign import Foreign
from groundup.model.io import WEIGHTS, empty, is_scorer, read_config, read_tensors, replace_weights, weight_files

SCORE = "score.weight"
REWARD, RIGHT, STEP_RIGHT = "reward", "right", "step_right"  # what a number means: the label's name in config.json


class Scored(nn.Module):
    """A trunk (Transformer or Foreign) and its score head. Modules and names are the trunk's, its own head left out.

    The trunk is shared, not copied: a policy and its value head may be one model. labels: what each number means.
    pad_token_id: what other programs pad with, which must not be what a text that is scored ends with.
    """

    trunk: Any
    score: nn.Linear

    def __init__(self, trunk: Any, labels: Sequence[str] = (REWARD,)) -> None:
        super().__init__()
        # `trunk` is no child of ours: we share its children instead, so that names stay those of a stock model
        inner, self.__dict__["trunk"] = getattr(trunk, "inner", trunk), trunk
        head = _head_name(trunk)
        for name, module in inner.named_children():
            if name != head:
                self.add_module(name, module)
        self.labels, self.pad_token_id = tuple(labels), trunk.config.pad_token_id
        device = next(trunk.blocks.parameters()).device
        self.score = nn.Linear(_width(trunk), len(self.labels), bias=False, device="meta").to_empty(device=device)
        nn.init.zeros_(self.score.weight)  # nothing is drawn from the run's random numbers

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the score head reads, [B, T, D]. Arguments as Transformer.hidden."""
        hidden_BTD: torch.Tensor = self.trunk.hidden(input_ids_BT, position_ids_BT, doc_ids_BT)
        if not isinstance(self.trunk, Foreign):
            return hidden_BTD
        hidden_BTD = hidden_BTD[..., : self.score.in_features]  # without what a head's bias needs
        return hidden_BTD if self.trunk.scale == 1.0 else hidden_BTD / self.trunk.scale

    def read(self, hidden_D: torch.Tensor) -> torch.Tensor:
        """The numbers of normalised hidden states [..., D], in fp32 also where the trunk computes in less: two answers
        are told apart by their difference. [...], or [..., labels] where there are several."""
        with torch.autocast(hidden_D.device.type, enabled=False):
            scores = F.linear(hidden_D.float(), self.score.weight.float())
        return scores.squeeze(-1) if len(self.labels) == 1 else scores

    def scores_BT(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Every token's number, for the text up to it, [B, T]."""
        return self.read(self.hidden(input_ids_BT, position_ids_BT, doc_ids_BT))

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.scores_BT(input_ids_BT, position_ids_BT, doc_ids_BT)

    def init_score(self, seed: int) -> Scored:
        """A fresh head, the same on every device: normal with std 1 / (D + 1), so that all begins near 0."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            fresh = torch.randn(self.score.weight.shape, generator=generator) / (self.score.in_features + 1)
            self.score.weight.copy_(fresh)
        return self

    def drop_head(self) -> Scored:
        """Let go of the trunk's own head: it writes no more."""
        if not isinstance(self.trunk, Foreign):
            self.trunk._modules.pop("lm_head", None)
        else:
            head = self.trunk.inner.get_output_embeddings()
            empty_head = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
            self.trunk.inner.set_output_embeddings(empty_head)
            self.trunk.scale = 1.0
        return self

    def train(self, mode: bool = True) -> Scored:
        super().train(mode)
        self.trunk.train(mode)
        return self

    @property
    def config(self) -> Any:
        return self.trunk.config

    @config.setter
    def config(self, changed: Any) -> None:
        self.trunk.config = changed

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.trunk.blocks
        return blocks

    @property
    def head_weight(self) -> torch.Tensor:
        """[labels, D]."""
        return self.score.weight

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models name it."""
        if isinstance(self.trunk, Foreign):
            found: nn.Module = self.trunk.inner.get_input_embeddings()
            return found
        return self.trunk.model.embed_tokens


def begin_scored(model: Any, seed: int, label: str = REWARD) -> Scored:
    """A model that scores, from one that writes (a fresh head; its own is let go) or one that scored before.

    UserError: a model of several numbers, or of an architecture of which transformers has no such model to save.
    """
    if isinstance(model, Scored):
        if len(model.labels) != 1:
            why = f"has {len(model.labels)} numbers ({', '.join(model.labels)}), and one score is trained"
            raise UserError("model", why, "begin with a model of one, or with one that writes")
        model.labels = (label,)
        return model
    if isinstance(model, Foreign):
        from groundup.model.scored_foreign import scoring_class

        scoring_class(model.config.stock)
    return Scored(model, (label,)).init_score(seed).drop_head()


def load_scorer(directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Scored:
    """The model of a stock `...ForSequenceClassification` folder, in eval mode. dtype: as load_model has it.

    UserError: no such folder; a missing, damaged or wrongly shaped tensor.
    """
    directory, device = Path(directory), torch.device(device)
    config = read_config(directory)
    if not is_scorer(directory):
        fix = "train one with recipes/reward.yaml"
        raise UserError(directory, "holds a model that writes, and no score head", fix)
    labels = _labels(directory)
    if not isinstance(config, ModelConfig):
        from groundup.model.scored_foreign import load_foreign_scorer

        return load_foreign_scorer(directory, config, labels, device, dtype)
    trunk = empty(replace(config, tie_word_embeddings=True))  # without a head of its own
    trunk.config = config
    wanted = {name: tuple(p.shape) for name, p in trunk.named_parameters()}
    wanted[SCORE] = (len(labels), config.hidden_size)
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        tensors.update(read_tensors(path, wanted, device, dtype))
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise UserError(directory, f"{len(missing)} tensors are missing, first {missing[0]}", "fetch the model again")
    trunk.load_state_dict({name: tensors[name] for name in wanted if name != SCORE}, assign=True)
    scored = Scored(trunk, labels)
    scored.score.weight = nn.Parameter(tensors[SCORE])
    return scored.requires_grad_(True).eval()


def save_scorer(scored: Scored, directory: str | Path) -> None:
    """Write config.json and model.safetensors, each whole or not at all. UserError as save_model."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, directory) from error
    if isinstance(scored.trunk, Foreign):
        from groundup.model.scored_foreign import save_foreign_scorer

        save_foreign_scorer(scored, directory)
        return
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in scored.state_dict().items()}
    dtype = str(next(scored.blocks.parameters()).dtype).removeprefix("torch.")
    config = scored.config.to_hf_dict(dtype=dtype)
    config["architectures"] = [name.replace("CausalLM", "SequenceClassification") for name in config["architectures"]]
    config |= label_names(scored.labels) | {"pad_token_id": scored.pad_token_id}
    replace_weights(directory / WEIGHTS, state)
    write_json(directory / "config.json", config)


def label_names(labels: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """As config.json has them."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def _labels(directory: Path) -> tuple[str, ...]:
    """What the numbers are called; transformers' default where config.json does not say."""
    found = read_json(directory)
    names = found.get("id2label")
    if not isinstance(names, dict) or not names:
        return tuple(f"LABEL_{i}" for i in range(int(found.get("num_labels") or 2)))
    if not all(key.isdecimal() for key in names):
        raise UserError(directory / "config.json", "its id2label does not count from 0", "fetch the model again")
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _head_name(trunk: Any) -> str:
    """What the module that holds the trunk's own head is called."""
    if not isinstance(trunk, Foreign):
        return "lm_head"
    head = trunk.inner.get_output_embeddings()
    return next((name for name, module in trunk.inner.named_children() if module is head), "")


def _width(trunk: Any) -> int:
    """Numbers that a head reads of a token."""
    if isinstance(trunk, Foreign):
        return int(trunk.inner.get_output_embeddings().in_features)
    return int(trunk.config.hidden_size)
