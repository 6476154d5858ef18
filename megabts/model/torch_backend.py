"""Plain PyTorch parts of a decoder: the oracle for every other backend, on CPU and GPU.

Norm and SwiGLU have their own backward: at small widths element-wise passes over memory, not matrix products, are
most of a step, and autograd's composition of them makes several times as many.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabts.model.backend import Recompute
from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta
from megabts.parallel.tensor import ColumnLinear, RowLinear, Vocabulary, check_columns


class TorchBackend:
    """`Backend` in plain PyTorch."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, tp: Axis, sequence: bool = False) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.tp = tp
        self.sequence = sequence

    def column_linear(self, weight: ParamMeta, bias: ParamMeta | None = None, *, entered: bool = False) -> nn.Module:
        """See `Backend`."""
        return ColumnLinear(weight, bias, self.tp, self.dtype, self.device, sequence=self.sequence, entered=entered)

    def row_linear(self, weight: ParamMeta, *, left: bool = False) -> nn.Module:
        """See `Backend`."""
        if left:  # then, as where the region is entered, this rank's slice is all there is to it
            check_columns(weight, self.tp)
            return self.column_linear(weight, entered=True)
        return RowLinear(weight, self.tp, self.dtype, self.device, sequence=self.sequence)

    def norm(self, size: int, eps: float, *, summed: bool = False) -> nn.Module:
        """See `Backend`."""
        return RMSNorm(size, eps, self.dtype, self.device, summed=summed)

    def split_norm(self, weight: ParamMeta, eps: float) -> nn.Module:
        """See `Backend`."""
        return SplitRMSNorm(weight, eps, self.tp, self.dtype, self.device)

    def norm_linear(
        self, size: int, eps: float, weight: ParamMeta, bias: ParamMeta | None = None
    ) -> tuple[nn.Module, nn.Module]:
        """See `Backend`."""
        return self.norm(size, eps, summed=self.sequence), self.column_linear(weight, bias)

    def norm_mlp(
        self, size: int, eps: float, gate_up: ParamMeta, down: ParamMeta, recompute: Recompute
    ) -> tuple[nn.Module, nn.Module]:
        """See `Backend`."""
        return self.norm(size, eps, summed=self.sequence), self.mlp(gate_up, down, recompute)

    def mlp(self, gate_up: ParamMeta, down: ParamMeta, recompute: Recompute) -> nn.Module:
        """See `Backend`."""
        return MLP(self.column_linear(gate_up), self.row_linear(down), recompute)

    def vocabulary(self, vocab_size: int, hidden_size: int, std: float) -> Vocabulary:
        """See `Backend`."""
        return Vocabulary(vocab_size, hidden_size, std, self.tp, self.dtype, self.device, sequence=self.sequence)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """See `Backend`."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if _explicit_is_faster(q, k):
            out = _ExplicitAttention.apply(q, k, v, mask)
        else:
            (batch, heads, s, _), kv_heads, t = q.shape, k.shape[1], k.shape[2]
            if s == 1:  # the query heads of one key head stand as its queries: keys and values need no copies
                q = q.reshape(batch, kv_heads, heads // kv_heads, -1)
            elif heads > kv_heads:
                k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            if mask is None and 1 < s < t:  # the kernel's own causal mask puts the first query at the first key
                mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
            causal = mask is None and s > 1
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            out = out.reshape(batch, heads, s, -1)
        return out.permute(2, 0, 1, 3).flatten(2)

    def frozen(self) -> "TorchBackend":
        """See `Backend`."""
        return self

    def checkpoint(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """See `Backend`."""
        out: Tensor = checkpoint(function, *args, use_reentrant=False)
        return out

    def forward_context(self, rows: int) -> AbstractContextManager[None]:
        """See `Backend`: there is nothing to open."""
        return nullcontext()


class MLP(nn.Module):
    """down(silu(gate x) * up x) with gate and up in one matrix (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        self.gate_up = gate_up
        self.down = down

    def forward(self, hidden: Tensor) -> Tensor:
        """[s or s / tp, b, D] -> the same."""
        gate_up = self.gate_up(hidden)  # [s, b, 2 F / tp]
        if self.recompute == "selective" and torch.is_grad_enabled():
            activated = checkpoint(swiglu, gate_up, use_reentrant=False)
        else:
            activated = swiglu(gate_up)
        out: Tensor = self.down(activated)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [.., gate | up]: [.., 2 F] -> [.., F]."""
    out: Tensor = _SwiGLU.apply(gate_up)
    return out


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(
        self, size: int, eps: float, dtype: torch.dtype, device: torch.device, *, summed: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.metas = {"weight": ParamMeta((size,), "constant", 1.0, summed=summed)}
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[.., size] -> [.., size]."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        exact = x if x.dtype == torch.float64 else x.float()
        normed = exact * scale
        grad = grad.to(exact.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad = grad * weight
        mean = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype), grad_weight, None


class SplitRMSNorm(nn.Module):
    """`RMSNorm` of a vector of which each rank of tp has a slice: the sum of squares goes over the ranks.

    A slice that several ranks hold (a key head of fewer than tp) counts once. Each of its holders has a part of its
    gradient, as of all that belongs to such a head (`ParamMeta.summed`).
    """

    def __init__(self, weight: ParamMeta, eps: float, tp: Axis, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps, self.tp = eps, tp
        self.metas = {"weight": weight}
        self.weight = nn.Parameter(torch.empty(weight.local_shape(tp), dtype=dtype, device=device))
        self.width = weight.shape[0]
        self.holders = tp.size * self.weight.shape[0] // self.width

    def forward(self, x: Tensor) -> Tensor:
        """[.., width / tp] -> the same."""
        out: Tensor = _SplitRMSNorm.apply(x, self.weight, self.eps, self.width, self.holders, self.tp)
        return out


class _SplitRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, width: int, holders: int, tp: Axis) -> Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        squares = all_reduce(torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_(), tp)
        scale = squares.div_(holders * width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.count, ctx.tp = holders * width, tp
        return (exact * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        exact = x if x.dtype == torch.float64 else x.float()
        normed = exact * scale
        grad = grad.to(exact.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad = grad * weight
            mean = all_reduce((grad * normed).sum(-1, keepdim=True), ctx.tp).div_(ctx.count)
            grad_x = grad.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        torch.mul(grad, F.silu(gate), out=out.chunk(2, -1)[1])
        out.chunk(2, -1)[0].copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def _explicit_is_faster(query: Tensor, key: Tensor) -> bool:
    """Training short sequences in bfloat16 on CPU, where the fused kernel's backward is 2-8x slower than this one."""
    wanted = query.requires_grad or key.requires_grad
    return wanted and query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= 512


class _ExplicitAttention(torch.autograd.Function):
    """Attention that keeps its probabilities; the queries of one key/value head are one matrix.

    query [b, heads, s, hd]; key, value [b, kv_heads, t, hd]; mask bool [b, 1, s, t] or None for causal.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, s, head_dim = query.shape
        kv_heads, t = key.shape[1:3]
        grouped = query.reshape(batch, kv_heads, -1, head_dim)  # [b, kv_heads, group s, hd]
        key, value = key.contiguous(), value.contiguous()
        scale = head_dim**-0.5
        scores = (grouped @ key.transpose(-1, -2)).view(batch, kv_heads, -1, s, t)
        if mask is None:
            allowed = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)
        else:
            allowed = mask.unsqueeze(2)
        blocked = torch.zeros(allowed.shape, dtype=scores.dtype, device=query.device)
        scores = torch.add(blocked.masked_fill_(~allowed, float("-inf")), scores, alpha=scale)
        probabilities = scores.softmax(-1).view(batch, kv_heads, -1, t)
        ctx.save_for_backward(grouped, key, value, probabilities)
        return (probabilities @ value).view(batch, heads, s, head_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value, probabilities = ctx.saved_tensors
        grouped = grad.reshape(query.shape)
        grad_value = probabilities.transpose(-1, -2) @ grouped
        grad_probabilities = grouped @ value.transpose(-1, -2)
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
        grad_scores.mul_(query.shape[-1] ** -0.5)
        grad_query = (grad_scores @ key).view(grad.shape)
        return grad_query, grad_scores.transpose(-1, -2) @ query, grad_value, None
