"""No tensor of tokens x vocabulary is ever alive: peak memory of the head's products, forward and backward, is watched.

Every storage that an operator makes is counted until it is freed. The plain forms are watched too: they must be caught.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from groundup.objectives.policy import policy_loss
from groundup.ops.loss import (
    default_chunk,
    entropy,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    selective_logprobs,
    selective_logprobs_and_entropy,
)

TOKENS, WIDTH, CHUNK = 2048, 8, 32


class Watch(TorchDispatchMode):
    """Peak bytes of the storages that were made inside and are alive at once; `largest`: of a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def cross_entropy(hidden, weight, labels, chunk):
    return linear_cross_entropy(hidden, weight, labels, chunk=chunk)


def logprobs(hidden, weight, labels, chunk):
    return selective_logprobs(hidden, weight, labels, chunk, temperature=0.7).sum()


def logprobs_and_entropy(hidden, weight, labels, chunk):
    return sum(x.sum() for x in selective_logprobs_and_entropy(hidden, weight, labels, chunk, entropy_grad=True))


def entropy_alone(hidden, weight, labels, chunk):
    return entropy(hidden, weight, labels, chunk).sum() + 0 * hidden.sum()


def grpo(hidden, weight, labels, chunk):
    """What a step of GRPO computes behind the trunk."""
    logprobs, entropies = selective_logprobs_and_entropy(hidden[None], weight, labels[None], chunk)
    ones = torch.ones_like(logprobs)
    return policy_loss(logprobs, None, ones, ones, ones.int(), "grpo", entropy_BT=entropies, entropy_coef=0.1)[0]


OURS = [cross_entropy, logprobs, logprobs_and_entropy, entropy_alone, grpo]


def watch(form, tokens: int, vocab: int, chunk: int | None, dtype: torch.dtype = torch.float32) -> Watch:
    """Peak of forward and backward. The gradient of the head, which is as large as the head, is part of it."""
    hidden = torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    with Watch() as watched:
        form(hidden, weight, labels, chunk).backward()
    return watched


@pytest.mark.parametrize("form", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_does_not_grow_with_tokens_times_vocabulary(form, dtype):
    small, large = 1024, 4096
    growth = watch(form, TOKENS, large, CHUNK, dtype).peak - watch(form, TOKENS, small, CHUNK, dtype).peak
    # A few chunks of logits in fp32 and half, the head and its gradient: nothing that tokens multiply
    assert growth <= 4 * (large - small) * (4 * CHUNK + 6 * WIDTH)
    assert growth < 4 * TOKENS * (large - small) / 10  # a tenth of what one tensor of all logits would add


@pytest.mark.parametrize("form", OURS)
def test_more_tokens_cost_the_same_at_any_vocabulary(form):
    """Twice the tokens: what is added is hidden states and figures of tokens, however large the vocabulary."""
    added = [
        watch(form, 2 * TOKENS, vocab, CHUNK).peak - watch(form, TOKENS, vocab, CHUNK).peak for vocab in (1024, 4096)
    ]
    assert max(added) <= 4 * TOKENS * (6 * WIDTH + 40)


@pytest.mark.parametrize("form", OURS)
def test_the_chunk_that_is_chosen_by_itself_keeps_the_promise(form):
    vocab = 8192
    all_logits = 4 * TOKENS * vocab
    watched = watch(form, TOKENS, vocab, None)
    assert watched.largest <= 4 * vocab * max(WIDTH, default_chunk(torch.empty(vocab, WIDTH))) < all_logits / 4
    assert watched.peak < all_logits / 2


def test_the_plain_forms_are_caught():
    """Otherwise the tests above could not fail."""

    def plain_cross_entropy(hidden, weight, labels, chunk):
        return linear_cross_entropy_reference(hidden, weight, labels)

    def plain_logprobs(hidden, weight, labels, chunk):
        return torch.log_softmax(hidden @ weight.T, -1).gather(1, labels[:, None]).sum()

    for form in (plain_cross_entropy, plain_logprobs):
        growth = watch(form, TOKENS, 4096, CHUNK).peak - watch(form, TOKENS, 1024, CHUNK).peak
        assert growth >= 2 * 4 * TOKENS * (4096 - 1024)  # the logits and their gradient or softmax
        assert watch(form, TOKENS, 1024, CHUNK).largest >= 4 * TOKENS * 1024
