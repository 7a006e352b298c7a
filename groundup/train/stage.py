"""What does a stage owe the loop? Batches, a loss as a sum and a count, and an evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from groundup.config import Recipe
from groundup.data.batch import Batch, Loader, PackedDataset, open_dataset
from groundup.data.mix import Source, permutation
from groundup.dist import World
from groundup.model.transformer import Transformer
from groundup.objectives.next_token import bits_per_byte, next_token, trained
from groundup.train.tags import TagWeights

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer
    from groundup.train.start import Start

Datasets: TypeAlias = "tuple[PackedDataset, PackedDataset | None]"  # for training, and held out


@dataclass(frozen=True)
class Place:
    """Where a process computes: its device, and itself among the ranks."""

    device: torch.device
    world: World


class Stage(ABC):
    """What a stage of training is: data, what is trained of a model, batches, a loss, an evaluation.

    The calls come in this order: open, the constructor, prepare, then the loop's. All ranks make all of them.
    """

    place: Place
    fingerprint: dict[str, int]  # figures of the data that must be the same when a run goes on

    @classmethod
    def of(cls, recipe: Recipe) -> type[Stage]:
        """The class that runs this recipe, where a setting of it decides."""
        return cls

    @classmethod
    @abstractmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> Any:
        """The data of a recipe, tokenised once. Every rank calls it; one of them does the work."""

    @abstractmethod
    def __init__(self, data: Any, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None: ...

    def prepare(self, begun: Start) -> nn.Module:
        """What the loop trains, the begun model by default; here other models (a reference, a teacher) are made."""
        return begun.model

    def rates(self, begun: Start) -> dict[str, float]:
        """Factors on the learning rate of single parameters of what `prepare` gave."""
        return begun.rates

    @abstractmethod
    def steps(self) -> int:
        """Optimizer steps of the run."""

    @abstractmethod
    def about(self) -> tuple[str, str]:
        """For people: the data in a line, and what an optimizer step takes of it."""

    @abstractmethod
    def fetch(self, step: int, accumulate: int) -> list[Any]:
        """This rank's micro-batches of an optimizer step, at least one: a pure function of the step, of the weights
        (on-policy stages) and of what `restore` was given. accumulate: how many, where the stage does not decide."""

    @abstractmethod
    def count(self, batch: Any) -> tuple[int, int]:
        """(what the loss is divided by, tokens processed) of a batch, known before its forward pass."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum, count, metrics): the loss summed over the batch, its count, and further sums over the same count."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures, the same on every rank; `val_loss` decides what is best. Empty: nothing is held out."""

    def figures(self) -> dict[str, float]:
        """Further figures for each logged line, the same on every rank: of the newest rollout, for example."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """CPU tensors of this rank, beside model and optimizer, that decide the steps to come (a rollout half used).
        They go into every checkpoint."""
        return {}

    def restore(self, states: list[dict[str, Tensor]]) -> None:  # noqa: B027  # most stages keep nothing
        """Before the first `fetch`: what `state` gave on each rank (there may have been another number of them)."""

    def save(self, begun: Start, folder: Path, tokenizer: Tokenizer) -> None:
        """The result: a stock model folder, or PEFT's files of an adapter, with the tokenizer."""
        begun.save(folder, tokenizer)


def open_rows(kind: str, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> Datasets:
    """The data of a recipe as packed rows: for training, and held out."""
    options: dict[str, Any] = {
        "kind": kind, "seq_len": recipe.train.seq_len, "cache_dir": cache, "seed": recipe.seed,
        "placeholders": recipe.fill,
    }  # fmt: skip
    sources = [Source(s.path, s.weight, s.split) for s in recipe.data]
    if not recipe.eval.data:
        return open_dataset(sources, tokenizer, val_fraction=recipe.eval.fraction, **options)
    train, _ = open_dataset(sources, tokenizer, **options)
    val, _ = open_dataset([Source(path) for path in recipe.eval.data], tokenizer, **options)
    return train, val


class TokenStage(Stage):
    """What the stages that foresee the next token share. They differ in which tokens are trained: `kind`."""

    kind: str  # how rows are read: "text" or "chat"

    def __init__(self, data: Datasets, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None:
        (train, self.val), self.place, self.config, self.seed = data, place, recipe.train, recipe.seed
        self.train = train
        self.loader = Loader(train, recipe.train.batch_size, recipe.seed, place.world.rank, place.world.size)
        self.weigh = TagWeights(tokenizer, recipe.train.tag_weight)
        self.fingerprint = {"rows": len(train), "trained_tokens": train.trained_tokens, "bytes": train.bytes}

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> Datasets:
        return open_rows(cls.kind, recipe, tokenizer, cache)

    @property
    def rows(self) -> int:
        """In one optimizer step, over all ranks."""
        return self.config.batch_size * self.config.accumulate * self.place.world.size

    def steps(self) -> int:
        return self.config.steps or math.ceil(self.config.epochs * len(self.train) / self.rows)

    def about(self) -> tuple[str, str]:
        data = self.train
        held = (
            f"{data.documents:,} documents in {len(data):,} rows of {data.seq_len} ({100 * data.fill:.1f}% full), "
            f"{data.trained_tokens:,} trained tokens; {len(self.val) if self.val else 'no'} rows held out"
        )
        return held, f"{self.rows} rows, {self.rows * data.seq_len:,} positions"

    def fetch(self, step: int, accumulate: int) -> list[Batch]:
        return [self.weigh(self.loader.batch_at(step * accumulate + i)) for i in range(accumulate)]

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
