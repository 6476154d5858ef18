"""RMSNorm and SwiGLU with their own backward, against autograd's; whole decoders in bfloat16."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megabts.model.torch_backend import RMSNorm, _RMSNorm, swiglu
from megabts.runtime.fusion import eager
from tests.model.models import batch, decoder, distance, gradients

CPU = torch.device("cpu")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = _RMSNorm.apply(x, weight, 1e-3, eager)
    return out


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "norm": (rms_norm, plain_rms_norm, [(3, 2, 10), (10,)]),
    "swiglu": (swiglu, plain_swiglu, [(3, 2, 10)]),
}


def inputs_of(case: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in CASES[case][2]]


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    assert torch.autograd.gradcheck(CASES[case][0], inputs_of(case, torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_composition(case: str) -> None:
    function, composition, _ = CASES[case]
    inputs = inputs_of(case, torch.float32)
    out, expected = function(*inputs), composition(*inputs)
    assert distance(out, expected) < 1e-6
    direction = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(out, inputs, direction), torch.autograd.grad(expected, inputs, direction))
    assert all(distance(found, grad) < 1e-6 for found, grad in pairs)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close_to_the_composition_in_float32(case: str) -> None:
    function, composition, _ = CASES[case]
    inputs = inputs_of(case, torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out, expected = function(*inputs), composition(*exact)
    assert out.dtype == torch.bfloat16
    assert distance(out.float(), expected) < 0.01
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad(out, inputs, direction.bfloat16())
    for found, grad in zip(grads, torch.autograd.grad(expected, exact, direction)):
        assert found.dtype == torch.bfloat16
        assert distance(found.float(), grad) < 0.02


def test_norm_of_zeros_and_of_large_numbers_is_finite() -> None:
    norm = RMSNorm(8, 1e-5, torch.bfloat16, CPU)
    torch.nn.init.ones_(norm.weight)
    x = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    large = norm(torch.full((1, 8), 1e18, dtype=torch.bfloat16))
    assert distance(large.float(), torch.ones(1, 8)) < 0.01


def test_norm_computes_only_the_gradients_that_are_wanted() -> None:
    norm = RMSNorm(8, 1e-5, torch.float32, CPU)
    torch.nn.init.ones_(norm.weight)
    x = torch.randn(3, 8)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    norm.weight.requires_grad_(False)
    norm.weight.grad = None
    norm(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.rms_norm(x, (8,), eps=1e-5).square().sum(), x)[0])


def test_a_decoder_in_bfloat16_is_close_to_float32() -> None:
    exact, low = decoder(init_std=0.1), decoder(init_std=0.1, dtype=torch.bfloat16)
    loss, grads = gradients(exact, *batch())
    low_loss, low_grads = gradients(low, *batch())
    assert low_loss.dtype == torch.float32
    assert abs(low_loss / loss - 1) < 0.01
    for name, grad in grads.items():
        assert low_grads[name].dtype == torch.bfloat16
        assert (low_grads[name].float() - grad).norm() / grad.norm() < 0.05, name
