"""Layers with Transformer Engine 2.12's names and arguments in plain PyTorch, collectives included.

Written from TE's documentation and sources, apart from megabts: what they share is torch. Of TE's arguments they have
those that matter here; `test_standin` holds names, defaults and places against TE's sources.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.te.fp8 import FP8GlobalStateManager, FP8Module, QuantisedWeight, Scaling


class _GatherRows(torch.autograd.Function):
    """Slices of the first dimension to the whole; gradients of the whole are summed and cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _summed_slice(grad, ctx.group), None


class _ScatterRows(torch.autograd.Function):
    """Partial sums to this rank's rows of the sum; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed_slice(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gathered(grad, ctx.group), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _summed_slice(x: Tensor, group: Any) -> Tensor:
    return _summed(x, group).chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()


class _Product(torch.autograd.Function):
    """x W^T, its operands rounded where there is a scaling: `index` is the product's number in its module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling | None, index: int, first: bool) -> Tensor:
        if scaling is not None:
            assert x.shape[:-1].numel() % 8 == 0, "FP8 needs 8 rows"
            assert all(size % 16 == 0 for size in (x.shape[-1], *weight.shape)), "FP8 needs multiples of 16"
            x = scaling.round(x, 3 * index, "forward")
            if not isinstance(weight, QuantisedWeight):
                weight = scaling.round(weight, 3 * index + 1, "forward")
        ctx.scaling, ctx.index, ctx.first = scaling, index, first
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight.detach())
        return x @ weight.detach().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if ctx.scaling is not None:
            grad = ctx.scaling.round(grad, 2 * ctx.index, "backward")
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if x is not None else None
        if ctx.first:
            FP8GlobalStateManager.update("backward")
        return grad_x, grad_weight, None, None, None


def _product(module: FP8Module, x: Tensor, weight: Tensor, scaling: Scaling | None, index: int = 0) -> Tensor:
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    first = scaling is not None and needed and FP8GlobalStateManager.is_first_fp8_module()
    if scaling is not None and not isinstance(weight, QuantisedWeight):
        module.weight_roundings += 1
    out: Tensor = _Product.apply(x, weight, scaling, index, first)
    return out


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = x if x.dtype == torch.float64 else x.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * weight.to(exact.dtype)
    return normed.to(x.dtype)


class _Split(FP8Module):
    """A module whose matrices are split over tensor-parallel ranks."""

    def set_ranks(self, tp_group: Any, tp_size: int, sequence_parallel: bool) -> None:
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel

    def into(self, x: Tensor) -> Tensor:
        if self.tp_size == 1:
            return x
        into: Tensor = (_GatherRows if self.sequence_parallel else _SumGradient).apply(x, self.tp_group)
        return into

    def out_of(self, x: Tensor) -> Tensor:
        if self.tp_size == 1:
            return x
        out: Tensor = (_ScatterRows if self.sequence_parallel else _Sum).apply(x, self.tp_group)
        return out


class Linear(_Split):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        self.set_ranks(tp_group, tp_size, sequence_parallel)
        assert parallel_mode in (None, "column", "row")
        self.parallel_mode = parallel_mode
        rows = out_features // self.tp_size if parallel_mode == "column" else out_features
        columns = in_features // self.tp_size if parallel_mode == "row" else in_features
        dtype = params_dtype or torch.get_default_dtype()
        self.weight = self.weight_parameter(rows, columns, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype)) if bias else torch.empty(0)

    def forward(self, inp: Tensor) -> Tensor:
        if self.parallel_mode == "column":
            inp = self.into(inp)
        out = _product(self, inp, self.weight, self.scaling())
        if self.parallel_mode == "row":
            out = self.out_of(out)
        return out + self.bias if self.bias.numel() else out


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        bias: bool = True,
        normalization: str = "LayerNorm",
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ) -> None:
        assert normalization == "RMSNorm"
        assert parallel_mode == "column"
        super().__init__(
            in_features, out_features, sequence_parallel, tp_group, tp_size, bias, params_dtype, parallel_mode, device
        )
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, device=device, dtype=self.weight.dtype))

    def forward(self, inp: Tensor) -> Tensor:
        return super().forward(_normed(inp, self.layer_norm_weight, self.eps))


class LayerNormMLP(_Split):
    num_products = 2

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        bias: bool = True,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        params_dtype: torch.dtype | None = None,
        set_parallel_mode: bool = False,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        self.set_ranks(tp_group, tp_size, sequence_parallel)
        assert (normalization, activation, set_parallel_mode, bias) == ("RMSNorm", "swiglu", True, False)
        self.eps = eps
        dtype, part = params_dtype or torch.get_default_dtype(), ffn_hidden_size // self.tp_size
        self.layer_norm_weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.fc1_weight = self.weight_parameter(2 * part, hidden_size, device=device, dtype=dtype)
        self.fc2_weight = self.weight_parameter(hidden_size, part, device=device, dtype=dtype)

    def forward(self, inp: Tensor) -> Tensor:
        # TE 2.12 reads `requires_grad` of the norm's absent bias when neither the input nor the norm needs a gradient.
        if torch.is_grad_enabled() and not inp.requires_grad and not self.layer_norm_weight.requires_grad:
            raise AttributeError("'NoneType' object has no attribute 'requires_grad'")
        scaling = self.scaling()
        normed = self.into(_normed(inp, self.layer_norm_weight, self.eps))
        first, second = _product(self, normed, self.fc1_weight, scaling).chunk(2, -1)
        activated = F.silu(first) * second  # TE gates with the first half (ops.SwiGLU)
        return self.out_of(_product(self, activated, self.fc2_weight, scaling, 1))


class RMSNorm(nn.Module):
    def __init__(self, normalized_shape: Any = None, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, **kwargs))

    def forward(self, inp: Tensor) -> Tensor:
        return _normed(inp, self.weight, self.eps)


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
    ) -> None:
        super().__init__()
        assert (qkv_format, attn_mask_type, attention_dropout) == ("sbhd", "causal", 0.0)
        self.sizes = num_attention_heads, num_gqa_groups or num_attention_heads, kv_channels

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        assert not FP8GlobalStateManager.FP8_ENABLED
        heads, groups, size = self.sizes
        s, batch = query_layer.shape[:2]
        assert query_layer.shape[2:] == (heads, size)
        assert key_layer.shape == value_layer.shape == (s, batch, groups, size)
        grouped = query_layer.unflatten(2, (groups, heads // groups))
        scores = torch.einsum("sbgqd,tbgd->bgqst", grouped, key_layer) / size**0.5
        later = torch.ones(s, s, dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return torch.einsum("bgqst,tbgd->sbgqd", weights, value_layer).reshape(s, batch, heads * size)
