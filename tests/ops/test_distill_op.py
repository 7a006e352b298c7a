"""The chunked divergence of two heads equals the plain one: value, gradients, ignored tokens, weights, top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from groundup.ops.distill import Beside, Likeliest, Terms, likeliest, linear_distill, linear_distill_reference
from groundup.ops.loss import linear_cross_entropy

TERMS = {
    "forward": Terms(0.3, 0.7, 0.0, 1.0),
    "forward, warm": Terms(0.3, 2.8, 0.0, 2.0),
    "reverse": Terms(0.0, 1.0, 1.0, 0.7),
    "jsd": Terms(0.5, 0.5, 0.5, 1.0),
    "jsd, skewed": Terms(0.0, 1.0, 0.9, 1.5),
    "no divergence": Terms(1.0, 0.0, 0.0, 1.0),
}


def case(tokens: int = 37, vocab: int = 53, spread: float = 1.0) -> tuple[Any, ...]:
    """(student's hidden, head, Beside, labels): the teacher is wider."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(tokens, 16, generator=generator) * spread).requires_grad_()
    head = torch.randn(vocab, 16, generator=generator).requires_grad_()
    teacher = Beside(torch.randn(tokens, 24, generator=generator) * spread, torch.randn(vocab, 24, generator=generator))
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden, head, teacher, labels


def gradients(found: tuple[torch.Tensor, ...], *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(found[0] * 0.3, leaves)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000, None])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_losses_and_gradients_equal_the_plain_form(terms: Terms, chunk: Any, weighted: bool, spread: float) -> None:
    hidden, head, teacher, labels = case(spread=spread)
    weights = torch.rand(37, generator=torch.Generator().manual_seed(1)) if weighted else None
    ours = linear_distill(hidden, head, teacher, labels, terms, weights, chunk)
    plain = linear_distill_reference(hidden, head, teacher, labels, terms, weights)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=2e-5)
    for a, b in zip(gradients(ours, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * max(10.0, b.abs().max().item()), rtol=2e-4)


def test_gradients_are_those_of_finite_differences() -> None:
    """Not of autograd through the same formulas: in double precision, by moving the numbers."""
    hidden, head, teacher, labels = case(tokens=5, vocab=7)
    hidden, head = hidden.detach().double(), head.detach().double()
    teacher = Beside(teacher.hidden_NE.double(), teacher.head_VE.double())
    for terms in TERMS.values():
        leaf = hidden.clone().float().requires_grad_()
        at = linear_distill(leaf, head.float(), _single(teacher), labels, terms)
        (slope,) = torch.autograd.grad(at[0], leaf)
        for place in ((1, 3), (2, 0)):
            step = torch.zeros_like(hidden)
            step[place] = 1e-4
            up, down = (_reference(hidden + sign * step, head, teacher, labels, terms) for sign in (1, -1))
            assert slope[place].item() == pytest.approx((up - down) / 2e-4, rel=2e-3, abs=1e-4)


def _single(teacher: Beside) -> Beside:
    return Beside(teacher.hidden_NE.float(), teacher.head_VE.float())


def _reference(hidden: Any, head: Any, teacher: Beside, labels: Any, terms: Terms) -> float:
    """In double precision, written out once more."""
    kept = labels != -100
    student = (hidden[kept] @ head.T).double()
    taught = (teacher.hidden_NE[kept] @ teacher.head_VE.T).double()
    s, t = (x / terms.temperature for x in (student, taught))
    p, q = s.softmax(-1), t.softmax(-1)
    if terms.beta in (0, 1):
        a, b = (q, p) if terms.beta == 0 else (p, q)
        far = (a * (a / b).log()).sum()
    else:
        m = terms.beta * q + (1 - terms.beta) * p
        far = terms.beta * (q * (q / m).log()).sum() + (1 - terms.beta) * (p * (p / m).log()).sum()
    nats = -student.log_softmax(-1).gather(1, labels[kept, None]).sum()
    return float(terms.cross_entropy * nats + terms.divergence * far)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_the_same_distribution_is_at_no_distance_and_at_rest(terms: Terms) -> None:
    hidden, head, _, labels = case()
    own = Beside(hidden.detach(), head.detach())
    found = linear_distill(hidden, head, own, labels, Terms(0.0, 1.0, terms.beta, terms.temperature))
    assert abs(found[2].item()) < 1e-5
    assert max(g.abs().max().item() for g in gradients(found, hidden, head)) < 1e-5


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_extreme_logits_stay_numbers(terms: Terms) -> None:
    """Probabilities that underflow on either side, or both, on the label too."""
    hidden = torch.tensor([[0.0, 300.0, 0.0], [0.0, 0.0, 90.0], [500.0, 0.0, 0.0]], requires_grad=True)
    teacher = Beside(torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 90.0], [0.0, 400.0, 0.0]]), torch.eye(3))
    found = linear_distill(hidden, torch.eye(3), teacher, torch.tensor([0, 1, 2]), terms)
    (slope,) = gradients(found, hidden)
    assert all(x.isfinite() for x in found) and slope.isfinite().all()
    assert found[1].item() == pytest.approx(300 + 90 + 500)
    if terms.beta == 0:
        assert found[2].item() == pytest.approx((300 + 500) / terms.temperature, rel=1e-5)


def test_without_divergence_it_is_the_cross_entropy() -> None:
    hidden, head, teacher, labels = case()
    found = linear_distill(hidden, head, teacher, labels, Terms(1.0, 0.0))
    plain = linear_cross_entropy(hidden, head, labels)
    torch.testing.assert_close(found[0], plain)
    torch.testing.assert_close(found[1], plain)
    for a, b in zip(gradients(found, hidden, head), gradients((plain,), hidden, head), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_the_whole_vocabulary_written_down_is_the_teacher_itself(terms: Terms) -> None:
    hidden, head, teacher, labels = case()
    says = likeliest(teacher.hidden_NE, teacher.head_VE, labels, 53, terms.temperature)
    ours = linear_distill(hidden, head, says, labels, terms, chunk=7)
    plain = linear_distill_reference(hidden, head, teacher, labels, terms)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for a, b in zip(gradients(ours, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_likeliest_and_all_others_as_one_outcome(beta: float) -> None:
    """Against the divergence of k + 1 outcomes, by autograd; never above the whole one."""
    hidden, head, teacher, labels = case()
    terms, kept = Terms(0.0, 1.0, beta, 1.3), labels != -100
    says = likeliest(teacher.hidden_NE, teacher.head_VE, labels, 4, 1.3)
    taught = (teacher.hidden_NE @ teacher.head_VE.T / 1.3).log_softmax(-1)[kept]
    assert torch.equal(says.ids_MK, taught.topk(4).indices)
    torch.testing.assert_close(says.logprobs_MK, taught.topk(4).values)
    student = (hidden @ head.T / 1.3).softmax(-1)[kept].gather(1, says.ids_MK)
    p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (student, says.logprobs_MK.exp()))
    m = beta * q + (1 - beta) * p
    plain = {0.0: q * (q / p).log(), 1.0: p * (p / q).log()}.get(
        beta, beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
    )
    ours = linear_distill(hidden, head, says, labels, terms)
    torch.testing.assert_close(ours[2], plain.sum(), atol=1e-4, rtol=1e-4)
    for a, b in zip(gradients(ours, hidden, head), gradients((plain.sum(),), hidden, head), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert ours[2] < linear_distill_reference(hidden, head, teacher, labels, terms)[2]


def test_shapes_of_a_batch_and_no_trained_token() -> None:
    hidden, head, teacher, labels = case(tokens=36)
    flat = linear_distill(hidden, head, teacher, labels, TERMS["jsd"])
    rows = Beside(teacher.hidden_NE.view(4, 9, 24), teacher.head_VE)
    batched = linear_distill(hidden.view(4, 9, 16), head, rows, labels.view(4, 9), TERMS["jsd"])
    for a, b in zip(flat, batched, strict=True):
        torch.testing.assert_close(a, b)
    none = linear_distill(hidden, head, teacher, torch.full_like(labels, -100), TERMS["jsd"])
    none[0].backward()
    assert [x.item() for x in none] == [0, 0, 0]
    assert not hidden.grad.any() and not head.grad.any()


def test_only_what_needs_a_gradient_gets_one() -> None:
    """A frozen head costs neither its gradient's memory nor the product that makes it."""
    hidden, head, teacher, labels = case(tokens=40, vocab=4096)
    made = {wanted: _made(hidden, head.detach().requires_grad_(wanted), teacher, labels) for wanted in (True, False)}
    own = {("aten::new_zeros", (4096, 16)), ("aten::addmm_", (4096, 16))}
    assert own <= made[True] and not own & made[False]
    with torch.no_grad():
        assert not linear_distill(hidden, head, teacher, labels, TERMS["jsd"])[0].requires_grad


def _made(hidden: Any, head: Any, teacher: Beside, labels: Any) -> set[tuple[str, tuple[int, ...]]]:
    with Shapes() as shapes:
        linear_distill(hidden, head, teacher, labels, Terms(0.5, 0.5), chunk=8)[0].backward()
    assert hidden.grad is not None
    return shapes.seen


class Shapes(TorchDispatchMode):
    """All that is computed: (operator, shape)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                self.seen.add((func._schema.name, tuple(each.shape)))
        return out

    @property
    def largest(self) -> int:
        return max(torch.Size(shape).numel() for _, shape in self.seen)


@pytest.mark.parametrize("kept", [False, True], ids=["beside", "written down"])
def test_no_tensor_of_tokens_and_vocabulary_ever_lives(kept: bool) -> None:
    """The largest tensor is a chunk of logits: it grows with the vocabulary, not with the tokens."""
    largest = {}
    for tokens in (256, 1024):
        for vocab in (1000, 4000):
            hidden, head, teacher, labels = case(tokens, vocab)
            says: Any = likeliest(teacher.hidden_NE, teacher.head_VE, labels, 8) if kept else teacher
            with Shapes() as shapes:
                linear_distill(hidden, head, says, labels, TERMS["jsd"], chunk=64)[0].backward()
            largest[tokens, vocab] = shapes.largest
    assert largest == {(tokens, vocab): max(64, 24) * vocab for tokens in (256, 1024) for vocab in (1000, 4000)}


def test_what_is_kept_for_the_way_back_is_small() -> None:
    hidden, head, teacher, labels = case(512, 4096)
    saved: list[int] = []
    note: Callable[[torch.Tensor], torch.Tensor] = lambda t: saved.append(t.numel()) or t  # type: ignore[func-returns-value]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        linear_distill(hidden, head, teacher, labels, TERMS["forward"])
    assert sum(saved) < 512 * 4096 / 10


def test_half_precision_inside_autocast_keeps_fp32_sums_and_gradients() -> None:
    hidden, head, teacher, labels = case()
    exact = linear_distill(hidden, head, teacher, labels, TERMS["jsd"])
    with torch.autocast("cpu", torch.bfloat16):
        half = linear_distill(hidden, head, teacher, labels, TERMS["jsd"])
        says = likeliest(teacher.hidden_NE, teacher.head_VE, labels, 5)
    half[0].backward()
    assert half[0].dtype == hidden.grad.dtype == head.grad.dtype == says.logprobs_MK.dtype == torch.float32
    for a, b in zip(half, exact, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=0.02)


def test_likeliest_may_come_back_from_disk_in_fewer_bits() -> None:
    hidden, head, teacher, labels = case()
    says = likeliest(teacher.hidden_NE, teacher.head_VE, labels, 8)
    stored = Likeliest(says.ids_MK.int(), says.logprobs_MK.half())
    a, b = (linear_distill(hidden, head, x, labels, TERMS["forward"])[2].item() for x in (says, stored))
    assert a == pytest.approx(b, rel=2e-3)
