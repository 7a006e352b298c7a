"""How does a small model learn from a large one? It is told not which token came, but how likely each one was.

Three ways to the teacher's word: it runs beside the student (white-box), or on what the student itself says (GKD), or
its likeliest tokens were written down before (topk.py). Asking a model of which only the text is to be had is no stage:
`groundup distill ask` makes rows for stage sft (data/ask.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundup.adapt.folder import is_adapter
from groundup.adapt.open import base_folder, open_model, open_tokenizer
from groundup.config import Recipe, RLConfig
from groundup.data.batch import Batch, PackedDataset
from groundup.data.mix import hash64, permutation
from groundup.device import autocast, compile_policy, pick_dtype
from groundup.errors import UserError
from groundup.model.hub import resolve
from groundup.model.io import describe, read_config
from groundup.model.transformer import Transformer
from groundup.objectives.distill import distill
from groundup.objectives.next_token import bits_per_byte
from groundup.ops.distill import Beside, Likeliest, Terms, likeliest
from groundup.tokenizer import Tokenizer
from groundup.train.experience import Experience, RolloutBatch, pack_rows, split_rows
from groundup.train.health import Graded, Samples
from groundup.train.matching import Matched, Matching
from groundup.train.prepare import compile_blocks
from groundup.train.prompts import Prompts, Stream, open_prompts
from groundup.train.rollout import Sampler
from groundup.train.stage import Datasets, Place, TokenStage, open_rows
from groundup.train.start import Start, fingerprint
from groundup.train.topk import TopK, name_of, open_topk

OWN, PROMPTS = 21, 22  # so that one seed makes unrelated choices
# Keys of the section rl that say how the student's own answers are sampled; all others are about rewards.
READ = {
    "prompts", "group_size", "max_tokens", "temperature", "top_p", "top_k", "enable_thinking", "max_sequences",
    "samples",
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """What `Distill.open` finds. cache: where the teacher's answers are kept."""

    rows: Datasets
    prompts: Prompts | None
    teacher: Path
    cache: Path


@dataclass
class TaughtBatch(Batch):
    """Rows with what the teacher said of their trained tokens, where that was written down."""

    ids_MK: Tensor | None = None
    logprobs_MK: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TaughtBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items() if t is not None}
        return replace(self, **moved)


class Distill(TokenStage):
    """A student and its teacher, on the data's tokens or on the student's own answers."""

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> Any:
        check_settings(recipe)
        teacher = check_teacher(recipe, tokenizer)
        prompts = open_prompts(recipe, tokenizer) if recipe.distill.lmbda else None
        return Data(open_rows(recipe.distill.data, recipe, tokenizer, cache), prompts, teacher, cache)

    def __init__(self, data: Data, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None:
        super().__init__(data.rows, recipe, place, tokenizer)
        self.data, self.recipe, self.tokenizer, self.settings = data, recipe, tokenizer, recipe.distill
        self.dtype = pick_dtype(recipe.train.dtype, place.device)
        self.terms = Terms(self.settings.alpha, self.settings.weight, self.settings.mixture, self.settings.temperature)
        self.teacher: Transformer | None = None
        self.kept: dict[str, TopK] = {}
        self.matching: Matching | None = None
        self.rollout: dict[str, float] = {}
        self.samples = Samples(recipe.output, recipe.rl.samples if place.world.main else 0)
        if data.prompts is not None:
            self.stream = Stream(len(data.prompts.train), recipe.seed, PROMPTS)
            self.fingerprint["prompts"] = data.prompts.characters

    def prepare(self, begun: Start) -> nn.Module:
        """The student; with projections beside it where layers are compared."""
        self.student: Transformer = begun.model
        known = " ".join(map(fingerprint, folders_of(self.data.teacher)))
        begun.fingerprint = " ".join(part for part in (begun.fingerprint, known) if part)
        if self.settings.top_k:
            self._keep(known)
            return begun.model
        self.teacher = self._load()
        if self.data.prompts is not None:
            longest = self.data.prompts.longest + self.recipe.rl.max_tokens
            settings = self.recipe.rl.at("distill")
            self.sampler = Sampler(begun.model, self.tokenizer, settings, self.seed, longest=longest, dtype=self.dtype)
        if not self.settings.inside:
            return begun.model
        self.matching = Matching(begun.model, self.teacher, self.settings, self.seed)
        return Matched(begun.model, self.matching)

    def _load(self) -> Transformer:
        half = self.dtype if self.place.device.type == "cuda" else None
        teacher = open_model(self.data.teacher, self.place.device, half).requires_grad_(False).eval()
        compile_blocks(teacher.blocks, compile_policy(self.config.compile, self.place.device))
        return teacher

    def _keep(self, known: str) -> None:
        """The teacher's likeliest tokens of all rows, from the disk; asked for, once, where they are not there."""
        theirs = read_config(folders_of(self.data.teacher)[-1]).vocab_size
        width, k = min(theirs, self.student.config.vocab_size), self.settings.top_k

        def asker() -> Any:
            return partial(self._ask, self._load(), width)

        for part, rows in (("train", self.train), ("val", self.val)):
            if rows is not None:
                folder = self.data.cache / name_of(self.recipe, rows, known, part, width)
                size = self.config.batch_size
                self.kept[part] = open_topk(folder, rows, k, width, asker, size, self.place.world)

    @torch.no_grad()
    def _ask(self, teacher: Transformer, width: int, batch: Batch) -> Likeliest:
        batch = batch.to(self.place.device)
        with autocast(self.place.device, self.dtype):
            hidden_BTD = teacher.hidden(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
            head, settings = teacher.head_weight[:width], self.settings
            return likeliest(hidden_BTD, head, batch.labels_BT, settings.top_k, settings.temperature)

    def about(self) -> tuple[str, str]:
        held, step = super().about()
        if self.settings.top_k:
            whose = f"its {self.settings.top_k} likeliest tokens kept in {self.data.cache}"
        else:
            whose = describe(cast(Transformer, self.teacher))
        if self.data.prompts is not None:
            asked = f"{self.recipe.rl.prompts} prompts for {100 * self.settings.lmbda:g}% of the steps"
            held += f"; {len(self.data.prompts.train):,} prompts, {asked}"
        return f"{held}; teacher {self.data.teacher}: {whose}", step

    def fetch(self, step: int, accumulate: int) -> list[Any]:
        if self.own(step):
            return self._answers(step)
        rows = [self.loader.rows_at(step * accumulate + i) for i in range(accumulate)]
        return [self.weigh(self._batch("train", self.train, each)) for each in rows]

    def own(self, step: int) -> bool:
        """Whether a step is on the student's own answers: lmbda of all, chosen by the seed."""
        chance = float(hash64(np.array([step]), self.seed, OWN)[0]) / 2.0**64
        return chance < self.settings.lmbda

    def _batch(self, part: str, data: PackedDataset, rows: NDArray[np.integer]) -> Batch:
        batch = data.batch(rows)
        if part not in self.kept:
            return batch
        said = self.kept[part].look_up(rows)
        return TaughtBatch(**vars(batch), ids_MK=said.ids_MK, logprobs_MK=said.logprobs_MK)

    def _answers(self, step: int) -> list[RolloutBatch]:
        """What the student now says to this rank's share of the step's prompts, in packed rows."""
        assert self.data.prompts is not None
        world, prompts = self.place.world, self.recipe.rl.prompts
        numbers = range(prompts)[world.rank :: world.size]
        asked = [self.data.prompts.train[i] for i in self.stream.at([step * prompts + number for number in numbers])]
        said = []
        for one in self.sampler.sample(asked, step, numbers):
            columns = {"mask": torch.tensor(one.mask, dtype=torch.float32)}
            ids, start = one.prompt_ids + one.ids, len(one.prompt_ids)
            experience = Experience(numbers[one.prompt], ids, start, one.truncated, columns=columns)
            said.append(Graded(experience, asked[one.prompt], one.text))
        self._note(said, step)
        batch, _ = pack_rows([one.experience for one in said], self.config.seq_len, self.tokenizer.pad_id)
        return list(split_rows(batch, self.config.batch_size, self.place.device))

    def _note(self, said: list[Graded], step: int) -> None:
        """Figures of all ranks' answers, and texts of some."""
        each = [one.experience for one in said]
        sums = [float(len(each)), sum(one.length for one in each), sum(one.truncated for one in each)]
        count, tokens, cut = self.place.world.sum(sums)
        self.rollout = {"completion_length": tokens / count, "truncated": cut / count}
        if self.samples.prompts:
            self.samples.write(said, step, step)

    def figures(self) -> dict[str, float]:
        """Of the newest rollout."""
        return self.rollout

    def state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.rollout.items()}

    def restore(self, states: list[dict[str, Tensor]]) -> None:
        self.rollout = {name: float(value) for name, value in states[0].items()} if states else {}

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The student's own answers have no cross entropy: what it says is no example to follow."""
        terms = replace(self.terms, cross_entropy=0.0) if isinstance(batch, RolloutBatch) else self.terms
        given = batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT
        seen: list[Tensor] | None = [] if self.matching is not None else None
        hidden_BTD = self._hidden(self.student, given, seen)
        weights_BT = getattr(batch, "weights_BT", None)
        says: Beside | Likeliest
        if self.teacher is None:
            says = Likeliest(batch.ids_MK, batch.logprobs_MK)
        else:
            taught: list[Tensor] | None = [] if self.matching is not None else None
            with torch.no_grad():
                says = Beside(self._hidden(self.teacher, given, taught), self.teacher.head_weight)
        loss, count, metrics = distill(hidden_BTD, self.student.head_weight, says, batch.labels_BT, terms, weights_BT)
        if self.matching is not None:
            assert self.teacher is not None and seen is not None and taught is not None
            inside = self.matching(self.student, seen, self.teacher, taught, batch)
            weights = {"hidden": self.settings.hidden_weight, "attention": self.settings.attention_weight}
            loss = loss + sum(weights[name] * value for name, value in inside.items())
            metrics |= {name: value.detach() for name, value in inside.items()}
        return loss, count, metrics

    @staticmethod
    def _hidden(model: Transformer, given: tuple[Tensor, Tensor, Tensor], seen: list[Tensor] | None) -> Tensor:
        return model.hidden(*given) if seen is None else model.hidden(*given, seen=seen)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The loss on held-out rows, and its parts; bits per byte are those of the data's own next tokens."""
        if self.val is None:
            return {}
        world, size = self.place.world, self.config.batch_size
        rows = permutation(len(self.val), self.seed)[: self.config.eval_rows][world.rank :: world.size]
        sums: dict[str, float] = dict.fromkeys(self._names(), 0.0)
        for at in range(0, len(rows), size):
            batch = self._batch("val", self.val, rows[at : at + size]).to(self.place.device)
            loss, count, metrics = self.loss(model, batch)
            for name, value in {"loss": loss, "count": count, **metrics}.items():
                sums[name] += float(value)
        sums = dict(zip(sums, world.sum(list(sums.values())), strict=True))
        counted = max(sums.pop("count"), 1.0)
        means = {f"val_{name}": value / counted for name, value in sums.items()}
        tokens_per_byte = self.val.trained_tokens / max(self.val.bytes, 1)
        return means | {"bits_per_byte": bits_per_byte(means["val_cross_entropy"], tokens_per_byte)}

    def _names(self) -> list[str]:
        inside = [name for name in ("hidden", "attention") if getattr(self.settings, f"{name}_weight")]
        return ["loss", "count", "cross_entropy", "divergence", *inside]


def check_settings(recipe: Recipe) -> None:
    """UserError: a key of rl that nothing here reads."""
    default = RLConfig()
    for key in RLConfig.model_fields:
        unread = key not in READ or not recipe.distill.lmbda
        if unread and getattr(recipe.rl, key) != getattr(default, key):
            why = "stage distill does not read it" if key not in READ else "nothing is sampled while distill.lmbda is 0"
            raise UserError(f"rl.{key}", why, f"leave rl.{key} out")


def check_teacher(recipe: Recipe, tokenizer: Tokenizer) -> Path:
    """The teacher's folder. UserError: none is named, another tokenizer, rows longer than it reads."""
    name = recipe.distill.teacher
    if name is None:
        raise UserError("distill.teacher", "is missing", "name the folder of the model to learn from")
    folder = resolve(name)
    same_tokens(tokenizer, open_tokenizer(folder), name)
    config = read_config(folders_of(folder)[-1])
    if tokenizer.vocab_size > config.vocab_size:
        why = f"has {config.vocab_size} rows in its head for {tokenizer.vocab_size} tokens"
        raise UserError(f"distill.teacher={name}", why, "use a teacher that knows all of the student's tokens")
    if recipe.train.seq_len > config.max_position_embeddings:
        why = f"{recipe.train.seq_len} exceeds the teacher's {config.max_position_embeddings} positions"
        raise UserError("train.seq_len", why, f"use train.seq_len={config.max_position_embeddings} or less")
    return folder


def folders_of(teacher: Path) -> list[Path]:
    """Where its weights lie; an adapter's base last."""
    return [teacher, base_folder(teacher)] if is_adapter(teacher) else [teacher]


def same_tokens(student: Tokenizer, teacher: Tokenizer, name: str) -> None:
    """UserError where a token of the student's is another one, or none, for the teacher; more of them do no harm."""
    if student.fingerprint() == teacher.fingerprint():
        return
    ours, theirs = (each.backend.get_vocab(with_added_tokens=True) for each in (student, teacher))
    different = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
    if different:
        number, token = different[0]
        there = theirs.get(token, "none")
        why = f"has another tokenizer: {len(different)} of the student's {len(ours)} tokens differ, the first is "
        why += f"{token!r}, {number} for the student and {there} for the teacher"
        fix = "use a teacher with the student's tokenizer, or its text alone: groundup distill ask"
        raise UserError(f"distill.teacher={name}", why, fix)
    text = "The quick brown fox: 12,345 jumps.\n小猫坐在垫子上。"
    if student.encode(text) != teacher.encode(text):
        why = "has the student's tokens, but puts text together from them in another way (other merges)"
        raise UserError(f"distill.teacher={name}", why, "use a teacher with the student's tokenizer")
