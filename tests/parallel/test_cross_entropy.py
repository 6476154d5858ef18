"""The chunked, vocabulary-parallel loss against F.cross_entropy, and three ranks against one."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megabts.config.run import ParallelConfig
from megabts.parallel.collectives import copy
from megabts.parallel.cross_entropy import _Softmax, linear_cross_entropy
from megabts.parallel.mesh import Axis, build_mesh
from megabts.parallel.tensor import Vocabulary, vocab_range
from megabts.runtime.fusion import eager
from tests.model.models import distance
from tests.ranks import run_ranks

ONE = Axis("tp")
T, V, D = 29, 97, 16


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D], labels [T], mask [T]; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    return hidden, weight, labels, (torch.rand(T, generator=generator) < 0.7).float()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * mask).sum()


@pytest.mark.parametrize("chunk", [1, 7, 28, 29, 1024])
def test_equals_torch_at_any_chunk(chunk: int) -> None:
    hidden, weight, labels, mask = inputs()
    expected = plain(hidden, weight, labels, mask)
    grads = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, mask, ONE, 0, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    for found, grad in zip(torch.autograd.grad(3 * loss, (hidden, weight)), grads):
        assert distance(found, grad) < 2e-6


def test_gradcheck() -> None:
    hidden, weight, labels, mask = inputs(torch.float64)
    small = [x.detach()[:11, :4].clone().requires_grad_() for x in (hidden, weight)]
    labels, mask = labels[:11] % 11, mask[:11]
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, mask, ONE, 0, chunk=4), small)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient_and_changes_nothing_else(frozen: int) -> None:
    hidden, weight, labels, mask = inputs()
    pair = [hidden, weight]
    expected = torch.autograd.grad(plain(hidden, weight, labels, mask), pair[1 - frozen])[0]
    pair[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, mask, ONE, 0, chunk=8).backward()
    other = pair[1 - frozen].grad
    assert other is not None
    assert distance(other, expected) < 2e-6
    assert pair[frozen].grad is None


def test_evaluation_computes_no_gradient() -> None:
    hidden, weight, labels, mask = inputs()
    expected = linear_cross_entropy(hidden, weight, labels, mask, ONE, 0)
    with (
        torch.no_grad(),
        patch("torch.mm", side_effect=AssertionError),
        patch("torch.zeros_like", side_effect=AssertionError),
    ):
        loss = linear_cross_entropy(hidden, weight, labels, mask, ONE, 0)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad


def test_masked_positions_may_hold_any_label_and_a_batch_may_be_all_masked() -> None:
    hidden, weight, labels, mask = inputs()
    expected = linear_cross_entropy(hidden, weight, labels, mask, ONE, 0)
    labels = torch.where(mask == 0, -100, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, labels, mask, ONE, 0), expected)
    none = linear_cross_entropy(hidden, weight, labels, torch.zeros(T), ONE, 0)
    none.backward()
    assert none.item() == 0
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels, mask = inputs()
    loss = linear_cross_entropy(hidden * 1000, weight, labels, mask, ONE, 0)
    torch.testing.assert_close(loss, plain(hidden * 1000, weight, labels, mask))


def test_bfloat16_is_close() -> None:
    hidden, weight, labels, mask = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, mask, ONE, 0, chunk=8)
    assert loss.dtype == torch.float32
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected = plain(exact[0], exact[1], labels, mask)
    assert abs(loss / expected - 1) < 0.01
    expected.backward()
    loss.backward()
    for low, high in zip((hidden, weight), exact):
        assert low.grad is not None
        assert high.grad is not None
        assert distance(low.grad.float(), high.grad) < 0.02


def test_softmax_chunk_is_the_gradient_of_the_logits() -> None:
    logits = torch.randn(5, 11, requires_grad=True)
    labels = torch.tensor([0, 10, 3, 3, 7])
    expected = F.cross_entropy(logits, labels, reduction="none")
    softmax = _Softmax(logits.detach().clone(), labels, ONE, 0, eager)
    torch.testing.assert_close(softmax.losses, expected)
    torch.testing.assert_close(softmax.gradient(torch.ones(5)), torch.autograd.grad(expected.sum(), logits)[0])


def split_loss(rank: int, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(loss, gradient of hidden, gradient of this rank's rows) at two chunk sizes."""
    tp = build_mesh(ParallelConfig(tensor=size), size, rank).tp
    first, last = vocab_range(V, tp)
    found = []
    for chunk in (7, 1024):
        hidden, weight, labels, mask = inputs()
        rows = weight.detach()[first:last].clone().requires_grad_()
        loss = linear_cross_entropy(copy(hidden, tp), rows, labels, mask, tp, first, chunk=chunk)
        loss.backward()
        assert hidden.grad is not None
        assert rows.grad is not None
        found.append((loss.detach(), hidden.grad, rows.grad))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_uneven_vocabularies_equal_one(size: int) -> None:
    hidden, weight, labels, mask = inputs()
    expected = plain(hidden, weight, labels, mask)
    expected.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    for per_chunk in zip(*run_ranks(size, split_loss, size)):
        for loss, grad_hidden, _ in per_chunk:
            torch.testing.assert_close(loss, expected.detach())
            assert distance(grad_hidden, hidden.grad) < 2e-6
        assert distance(torch.cat([rows for _, _, rows in per_chunk]), weight.grad) < 2e-6


def test_ranks_of_an_uneven_vocabulary_take_the_same_chunks() -> None:
    """Their all-reduces are chunk by chunk: others would not meet."""
    device = torch.device("meta")
    heads = [Vocabulary(8193, 4, 0.02, Axis("tp", 2, rank), torch.float32, device) for rank in range(2)]
    assert [len(head.weight) for head in heads] == [4097, 4096]
    assert heads[0].chunk == heads[1].chunk == (1 << 21) // 4097
