"""Rotary positions (Su et al., arXiv 2104.09864) in Llama's rotate-half order, with linear, llama3 and YaRN scaling."""

import math
from typing import Any

import torch
from torch import Tensor

from megabts.config.model import ModelConfig
from megabts.runtime.fusion import Fuse, eager


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angular frequencies [head_dim / 2], radians per position, float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    if scaling["type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["type"] == "yarn":
        return _yarn(config.rope_theta**exponents, config.rope_theta, scaling)
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


def _yarn(powers: Tensor, base: float, scaling: dict[str, Any]) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): dimensions that turn seldom over the original length are interpolated by
    `factor`, those that turn often kept, a linear ramp between; `powers`: the frequencies' inverses [head_dim / 2]."""
    head_dim = 2 * len(powers)

    def dimension(rotations: float) -> float:
        """The dimension that turns so often over the original length."""
        length = scaling["original_max_position"] / (rotations * 2 * math.pi)
        return (head_dim * math.log(length)) / (2 * math.log(base))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(len(powers), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def rotation(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype, frequencies: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [s, b or 1, 1, head_dim / 2] in `dtype`, for positions [s] or [s, b].

    YaRN's attention factor is in both. `frequencies`: the config's, where they are at hand on that device.
    """
    if frequencies is None:
        frequencies = inverse_frequencies(config).to(positions.device)
    angles = positions.unsqueeze(-1).float() * frequencies
    if positions.dim() == 1:
        angles = angles.unsqueeze(1)
    angles = angles.unsqueeze(2)
    scale = config.rope_scaling.get("attention_factor", 1.0)  # YaRN's, of queries and keys alike
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], fuse: Fuse = eager) -> Tensor:
    """Rotate heads x [s, b, heads, head_dim] by `rotation`'s angles."""
    return _Rotate.apply(x, *rope, fuse)


def rotate_heads(
    heads: Tensor, rope: tuple[Tensor, Tensor], num_query: int, num_key: int, fuse: Fuse = eager
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated, and values, of heads [s, b, query + key + value heads, head_dim] in this order."""
    query, key, value = _RotateHeads.apply(heads, *rope, num_query, num_key, fuse)
    return query, key, value


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(x, cos, -sin)


class _Rotate(torch.autograd.Function):
    """A (scaled) rotation's backward is the one by the opposite angle; nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, fuse: Fuse) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.fuse = fuse
        return fuse(_turn)(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.fuse(_turn_back)(grad, *ctx.saved_tensors), None, None, None


class _RotateHeads(torch.autograd.Function):
    """`_Rotate` of two of three parts, whose gradients come together again in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, num_query: int, num_key: int, fuse: Fuse
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.fuse = fuse
        turned = fuse(_turn)(heads[:, :, : num_query + num_key], cos, sin)
        return turned[:, :, :num_query], turned[:, :, num_query:], heads[:, :, num_query + num_key :]

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.fuse(_heads_turned_back)(query, key, value, *ctx.saved_tensors), None, None, None, None, None


def _heads_turned_back(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([_turn_back(query, cos, sin), _turn_back(key, cos, sin), value], 2)
