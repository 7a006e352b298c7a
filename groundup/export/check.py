"""Does what left still compute what stayed? The same prompts through both, and the distance between the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.tokenizer import Tokenizer

TEXTS = (
    "The river was wide, and the old bridge had 12 arches of grey stone. We crossed it at noon.",
    "小明住在河边的蓝色房子里，他有三只猫和12只鸡。今天天气很好，我们去公园吧！",
    "def add(a, b):\n    return a + b  # don't\n\n\nprint(add(3.5, -42))\n",
    "Ünïcode, emoji \U0001f600 and   runs \t of  spaces; 1234567890 = 2 * 617283945.",
)
LONGEST = 64  # tokens of a prompt: enough for every position to look back, cheap on any machine


@dataclass(frozen=True)
class Closeness:
    """max_abs_difference of logits; kl in nats a token, of the copy from the original; share of equal first choices."""

    tokens: int
    max_abs_difference: float
    kl: float
    top1_agreement: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "max_abs_difference": self.max_abs_difference,
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
        }


def prompts(tokenizer: Tokenizer, config: ModelConfig) -> list[list[int]]:
    """Ids of the texts above and of a chat, where there is a template, cut to what the model takes."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    if tokenizer.chat_template:
        with suppress(UserError):  # a template that refuses a plain question: the texts will do
            ids.append(tokenizer.render([{"role": "user", "content": TEXTS[0]}], add_generation_prompt=True).ids)
    most = min(LONGEST, config.max_position_embeddings)
    return [prompt[:most] for prompt in ids if prompt]


def logits(model: Callable[[torch.Tensor], torch.Tensor], ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """[T, V] fp32 for each prompt."""
    with torch.no_grad():
        return [model(torch.tensor([prompt]))[0].float() for prompt in ids]


def compare(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> Closeness:
    """How far the second list of logits is from the first."""
    worst, kl, equal, tokens = 0.0, 0.0, 0, 0
    for a_TV, b_TV in zip(before, after, strict=True):
        difference = (a_TV - b_TV).abs().max().item()
        worst = difference if math.isnan(difference) else max(worst, difference)
        p_TV, q_TV = a_TV.double().log_softmax(-1), b_TV.double().log_softmax(-1)
        kl += (p_TV.exp() * (p_TV - q_TV)).sum().item()
        equal += int((a_TV.argmax(-1) == b_TV.argmax(-1)).sum())
        tokens += a_TV.shape[0]
        if math.isnan(worst):
            break
    return Closeness(tokens, worst, max(kl / tokens, 0.0), equal / tokens)


def demand(found: Closeness, before: Sequence[torch.Tensor], exact: bool, where: object) -> None:
    """UserError unless the copy is usable: the same numbers where `exact`, finite ones otherwise."""
    if not math.isfinite(found.max_abs_difference):
        raise UserError(where, "the copy computes no numbers: its weights do not fit that type", "use f32")
    limit = 1e-4 * max(1.0, *(tensor.abs().max().item() for tensor in before))
    if exact and found.max_abs_difference > limit:
        why = f"the copy's logits differ by {found.max_abs_difference:.2g}, which is more than rounding"
        raise UserError(where, why, "nothing was written; please report the model's config.json")


def same_ids(before: Tokenizer, after: Tokenizer, where: object) -> int:
    """The number of texts on which two tokenizers gave the same ids. UserError at the first where they do not."""
    for text in TEXTS:
        if before.encode(text) != after.encode(text):
            why = f"the copy's tokenizer reads {text[:20]!r} otherwise"
            raise UserError(where, why, "nothing was written; please report the model's tokenizer.json")
    return len(TEXTS)
