"""Mixing against formulas in float64: members that are alike, dropout that keeps next to nothing."""

import pytest
import torch
from torch import Tensor

from megabts.bts.mixing import gate_dropout, softmax_mix


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Of several tensors together, relative."""
    wanted = torch.stack(exact)
    return float((torch.stack(found).double() - wanted).norm() / wanted.norm())


def test_gates_learn_what_members_that_are_alike_differ_in() -> None:
    """In bfloat16, where members' states are the same but for 3%, as those of branched models are: the gradients are
    the formula's of the very same numbers, rounded once."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(32, 4, 64, generator=generator)

    common = draw()
    states = [(common + 0.03 * draw()).bfloat16() for _ in range(4)]
    logits, grad = [draw().bfloat16() for _ in range(4)], draw().bfloat16()
    inputs = [tensor.clone().requires_grad_() for tensor in (*logits, *states)]
    mixed = softmax_mix(inputs[:4], inputs[4:])
    mixed.backward(grad)
    exact = [tensor.double().requires_grad_() for tensor in (*logits, *states)]
    formula = (torch.stack(exact[:4]).softmax(0) * torch.stack(exact[4:])).sum(0)
    formula.backward(grad.double())
    rounded = 2**-8
    assert error([mixed.detach()], [formula.detach()]) < rounded
    for part in (slice(0, 4), slice(4, 8)):
        found = [tensor.grad for tensor in inputs[part] if tensor.grad is not None]
        assert error(found, [tensor.grad for tensor in exact[part] if tensor.grad is not None]) < rounded


@pytest.mark.parametrize("probability", [0.2, 0.99993, 0.9999999])
def test_dropout_of_any_probability_keeps_the_mean(probability: float) -> None:
    """Probabilities are multiples of 2^-16, and one that rounds to 1 still keeps something, now and then."""
    dropped = gate_dropout(torch.ones(1024, 1, 4096), probability, [5])
    kept = (dropped != 0).float().mean().item()
    assert kept == pytest.approx(max(1 - probability, 2**-16), rel=0.5)
    share = 1 / dropped.max().item()
    standard_error = ((1 - share) / share / dropped.numel()) ** 0.5
    assert dropped.mean().item() == pytest.approx(1, abs=4 * standard_error)
