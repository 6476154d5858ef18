"""Clipping by the global norm, against torch's."""

import math

import pytest
import torch
from torch import Tensor, nn

from megabts.optimizer.clip import clip_gradients
from megabts.parallel.ddp import GradientBuffer
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import ParamMeta


def filled(*values: Tensor) -> GradientBuffer:
    """A buffer of these gradients, each of one parameter, in buckets of 20 elements."""
    named = [(str(i), nn.Parameter(torch.empty_like(v)), ParamMeta(tuple(v.shape))) for i, v in enumerate(values)]
    gradients = GradientBuffer(named, ParallelMesh(), bucket_elements=20)
    for slot in gradients.slots:
        slot.grad.copy_(values[int(slot.name)])
    return gradients


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_equals_torch(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((50,), (3, 7), ())]
    gradients = filled(*values)
    parameters = [nn.Parameter(torch.zeros_like(value)) for value in values]
    for parameter, value in zip(parameters, values):
        parameter.grad = value.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    assert clip_gradients(gradients, max_norm) == pytest.approx(expected)
    for slot in gradients.slots:
        torch.testing.assert_close(slot.grad, parameters[int(slot.name)].grad)


def test_zero_never_clips() -> None:
    gradients = filled(torch.full((4,), 1e6))
    assert clip_gradients(gradients, 0.0) == 2e6
    assert gradients.flat.tolist() == [1e6] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_and_left(value: float) -> None:
    gradients = filled(torch.tensor([1.0, value]))
    assert not math.isfinite(clip_gradients(gradients, 1.0))
    assert gradients.flat[0] == 1.0


def test_empty_and_zero_gradients_have_norm_zero() -> None:
    assert clip_gradients(filled(), 1.0) == 0.0
    assert clip_gradients(filled(torch.zeros(3)), 1.0) == 0.0


def test_norm_of_a_long_buffer_is_accurate() -> None:
    assert clip_gradients(filled(torch.full((4_000_000,), 1e-3)), 0.0) == pytest.approx(2.0, rel=2e-6)
