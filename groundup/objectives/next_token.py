"""Was the next token foreseen? Cross entropy of the next token, as a sum and a count."""

from __future__ import annotations

import math

from torch import Tensor

from groundup.ops.loss import linear_cross_entropy

IGNORE = -100  # the label of a position that is not trained


def next_token(
    hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, weights_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum of -log p(label) in nats, number of labels), over the labels that are not -100.

    labels_BT[b, t] is the token that follows position t. The B x T x V logits are never kept. Dividing is left to the
    loop, which alone knows the count of the whole global batch. weights_BT: a factor for each label's loss.
    """
    return linear_cross_entropy(hidden_BTD, head_VD, labels_BT, weights_N=weights_BT), trained(labels_BT)


def trained(labels: Tensor) -> Tensor:
    """How many positions carry a label."""
    return (labels != IGNORE).sum()


def bits_per_byte(nats_per_token: float, tokens_per_byte: float) -> float:
    """A mean loss as bits per UTF-8 byte of the text behind it: comparable across tokenizers."""
    return nats_per_token * tokens_per_byte / math.log(2)
