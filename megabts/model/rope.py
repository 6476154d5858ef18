"""Rotary positions (Su et al., arXiv 2104.09864) in Llama's rotate-half order, with linear and llama3 scaling."""

import math
from typing import Any

import torch
from torch import Tensor

from megabts.config.model import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angular frequencies [head_dim / 2], radians per position, float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    if scaling["type"] == "linear":
        return frequencies / scaling["factor"]
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position"]
    wavelength = 2 * math.pi / frequencies
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(medium, between, scaled)


def rotation(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [s, b or 1, 1, head_dim / 2] in `dtype`, for positions [s] or [s, b]."""
    frequencies = inverse_frequencies(config).to(positions.device)
    angles = positions.unsqueeze(-1).float() * frequencies
    if positions.dim() == 1:
        angles = angles.unsqueeze(1)
    angles = angles.unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads x [s, b, heads, head_dim] by `rotation`'s angles."""
    return _Rotate.apply(x, *rope)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    low, high = out.chunk(2, -1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out


class _Rotate(torch.autograd.Function):
    """A rotation's backward is the rotation by the opposite angle; nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None
