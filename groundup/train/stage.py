"""What does a stage owe the loop? Batches, a loss as a sum and a count, and an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from groundup.config import Recipe
from groundup.data.batch import Batch, Loader, PackedDataset, open_dataset
from groundup.data.mix import Source, permutation
from groundup.dist import World
from groundup.model.transformer import Transformer
from groundup.objectives.next_token import bits_per_byte, next_token, trained

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer


@dataclass(frozen=True)
class Place:
    """Where a process computes: its device, and itself among the ranks."""

    device: torch.device
    world: World


class Batches(Protocol):
    def batch_at(self, step: int) -> Any:
        """This rank's batch of a micro-step, as a pure function of its number."""


class Stage(Protocol):
    """All that the loop knows of a stage."""

    fingerprint: dict[str, int]  # figures of the data that must be the same when a run goes on

    @property
    def loader(self) -> Batches: ...

    def count(self, batch: Any) -> tuple[int, int]:
        """(what the loss is divided by, tokens processed) of a batch, known before its forward pass."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum, count, metrics): the loss summed over the batch, its count, and further sums over the same count."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures, the same on every rank; `val_loss` decides what is best. Empty: nothing is held out."""


class TokenStage:
    """What the stages that foresee the next token share. They differ in which tokens are trained: `kind`."""

    kind: str  # how rows are read: "text" or "chat"

    def __init__(self, train: PackedDataset, val: PackedDataset | None, recipe: Recipe, place: Place) -> None:
        self.train, self.val, self.place, self.config, self.seed = train, val, place, recipe.train, recipe.seed
        self.loader = Loader(train, recipe.train.batch_size, recipe.seed, place.world.rank, place.world.size)
        self.fingerprint = {"rows": len(train), "trained_tokens": train.trained_tokens, "bytes": train.bytes}

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> tuple[PackedDataset, PackedDataset | None]:
        """(training, validation) data of a recipe, tokenised once. Every rank calls it; one of them does the work."""
        options: dict[str, Any] = {
            "kind": cls.kind, "seq_len": recipe.train.seq_len, "cache_dir": cache, "seed": recipe.seed,
            "placeholders": recipe.fill,
        }  # fmt: skip
        sources = [Source(s.path, s.weight, s.split) for s in recipe.data]
        if not recipe.eval.data:
            return open_dataset(sources, tokenizer, val_fraction=recipe.eval.fraction, **options)
        train, _ = open_dataset(sources, tokenizer, **options)
        val, _ = open_dataset([Source(path) for path in recipe.eval.data], tokenizer, **options)
        return train, val

    def count(self, batch: Batch) -> tuple[int, int]:
        return int(trained(batch.labels_BT)), int((batch.doc_ids_BT >= 0).sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        decoder = cast(Transformer, model)
        h_BTD = decoder.hidden(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
        return *next_token(h_BTD, decoder.head_weight, batch.labels_BT, batch.weights_BT), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean loss (nats per token) and bits per byte over the same `eval_rows` held-out rows each time."""
        if self.val is None:
            return {}
        world, size = self.place.world, self.config.batch_size
        rows = permutation(len(self.val), self.seed)[: self.config.eval_rows][world.rank :: world.size]
        nats = tokens = 0.0
        for at in range(0, len(rows), size):
            total, count, _ = self.loss(model, self.val.batch(rows[at : at + size]).to(self.place.device))
            nats, tokens = nats + float(total), tokens + float(count)
        nats, tokens = world.sum([nats, tokens])
        mean, tokens_per_byte = nats / max(tokens, 1), self.val.trained_tokens / max(self.val.bytes, 1)
        return {"val_loss": mean, "bits_per_byte": bits_per_byte(mean, tokens_per_byte)}
