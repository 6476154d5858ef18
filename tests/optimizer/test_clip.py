"""Clipping by the global norm, against torch's."""

import math

import pytest
import torch

from megabts.optimizer.clip import clip_gradients


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_equals_torch(max_norm: float) -> None:
    flat = torch.randn(50, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(torch.zeros(50))
    parameter.grad = flat.clone()
    expected = torch.nn.utils.clip_grad_norm_([parameter], max_norm).item()
    assert clip_gradients(flat, max_norm) == pytest.approx(expected)
    torch.testing.assert_close(flat, parameter.grad)


def test_zero_never_clips() -> None:
    flat = torch.full((4,), 1e6)
    assert clip_gradients(flat, 0.0) == 2e6
    assert flat.tolist() == [1e6] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_and_left(value: float) -> None:
    flat = torch.tensor([1.0, value])
    norm = clip_gradients(flat, 1.0)
    assert not math.isfinite(norm)
    assert flat[0] == 1.0


def test_empty_and_zero_gradients_have_norm_zero() -> None:
    assert clip_gradients(torch.zeros(0), 1.0) == 0.0
    assert clip_gradients(torch.zeros(3), 1.0) == 0.0


def test_norm_of_a_long_buffer_is_accurate() -> None:
    assert clip_gradients(torch.full((4_000_000,), 1e-3), 0.0) == pytest.approx(2.0, rel=1e-4)
