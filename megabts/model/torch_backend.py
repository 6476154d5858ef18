"""Plain PyTorch parts of a decoder: the oracle for every other backend, on CPU and GPU.

Norm, SwiGLU and attention have their own backward: at small widths element-wise passes over memory, not matrix
products, are most of a step, and autograd's composition of them makes several times as many. What is element-wise is a
function of its own, which `fuse` may compile.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabts.model.backend import Recompute
from megabts.model.fp8_linear import FP8Linear
from megabts.model.te_fp8 import FP8
from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta
from megabts.parallel.tensor import ColumnLinear, RowLinear, Vocabulary, check_columns
from megabts.runtime.fusion import Fuse, eager


class TorchBackend:
    """`Backend` in plain PyTorch.

    fp8: current keeps the weights of frozen linears in FP8, and multiplies them so (`fp8_linear`); frozen: dtype of
    what never trains, None for `dtype`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        tp: Axis,
        sequence: bool = False,
        fuse: Fuse = eager,
        fp8: FP8 = "none",
        frozen: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.tp = tp
        self.sequence = sequence
        self.fuse = fuse
        self.fp8: FP8 = fp8
        self.quantised = False
        self.frozen_dtype = frozen or dtype
        self.keeps_probabilities = True

    def column_linear(self, weight: ParamMeta, bias: ParamMeta | None = None, *, entered: bool = False) -> nn.Module:
        """See `Backend`."""
        if self.quantised:
            return FP8Linear(self, weight, bias, enters=not entered)
        return ColumnLinear(weight, bias, self.tp, self.dtype, self.device, sequence=self.sequence, entered=entered)

    def row_linear(self, weight: ParamMeta, *, left: bool = False) -> nn.Module:
        """See `Backend`."""
        if left:  # then, as where the region is entered, this rank's slice is all there is to it
            check_columns(weight, self.tp)
            return self.column_linear(weight, entered=True)
        if self.quantised:
            return FP8Linear(self, weight, leaves=True)
        return RowLinear(weight, self.tp, self.dtype, self.device, sequence=self.sequence)

    def norm(self, size: int, eps: float, *, summed: bool = False) -> nn.Module:
        """See `Backend`."""
        return RMSNorm(size, eps, self.dtype, self.device, summed=summed, fuse=self.fuse)

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
        return MLP(self.column_linear(gate_up), self.row_linear(down), recompute, self.fuse)

    def vocabulary(self, vocab_size: int, hidden_size: int, std: float) -> Vocabulary:
        """See `Backend`."""
        return Vocabulary(
            vocab_size, hidden_size, std, self.tp, self.dtype, self.device, sequence=self.sequence, fuse=self.fuse
        )

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """See `Backend`."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if _explicit_is_faster(q, k):
            out = _ExplicitAttention.apply(q, k, v, mask, self.keeps_probabilities)
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
        """See `Backend`. Activations of several members live at one time: attention's largest are formed again."""
        other = copy(self)
        other.dtype = self.frozen_dtype
        other.keeps_probabilities = other.dtype.itemsize <= 2
        other.quantised = self.fp8 == "current"
        return other

    def checkpoint(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """See `Backend`."""
        out: Tensor = checkpoint(function, *args, use_reentrant=False)
        return out

    def forward_context(self, rows: int) -> AbstractContextManager[None]:
        """See `Backend`: there is nothing to open."""
        return nullcontext()


class MLP(nn.Module):
    """down(silu(gate x) * up x) with gate and up in one matrix (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, recompute: Recompute, fuse: Fuse = eager) -> None:
        super().__init__()
        self.recompute = recompute
        self.fuse = fuse
        self.gate_up = gate_up
        self.down = down

    def forward(self, hidden: Tensor) -> Tensor:
        """[s or s / tp, b, D] -> the same."""
        gate_up = self.gate_up(hidden)  # [s, b, 2 F / tp]
        if self.recompute == "selective" and torch.is_grad_enabled():
            activated = checkpoint(swiglu, gate_up, self.fuse, use_reentrant=False)
        else:
            activated = swiglu(gate_up, self.fuse)
        out: Tensor = self.down(activated)
        return out


def swiglu(gate_up: Tensor, fuse: Fuse = eager) -> Tensor:
    """silu(gate) * up of [.., gate | up]: [.., 2 F] -> [.., F]."""
    out: Tensor = _SwiGLU.apply(gate_up, fuse)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, fuse: Fuse) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.fuse = fuse
        return fuse(_activate)(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        return ctx.fuse(_activate_backward)(grad, gate_up), None


def _activate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _activate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)], -1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(
        self,
        size: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        *,
        summed: bool = False,
        fuse: Fuse = eager,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.fuse = fuse
        self.metas = {"weight": ParamMeta((size,), "constant", 1.0, summed=summed)}
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[.., size] -> [.., size]."""
        return _RMSNorm.apply(x, self.weight, self.eps, self.fuse)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, fuse: Fuse) -> Tensor:
        out, scale = fuse(_norm)(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.fuse = fuse
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x, grad_weight = ctx.fuse(_norm_backward)(grad, *ctx.saved_tensors, need_x, need_weight)
        return grad_x, grad_weight, None, None


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the normed x, 1 / rms in fp32)."""
    exact = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    scale = (norm.square() / x.shape[-1]).add_(eps).rsqrt_()
    return (exact * scale).to(x.dtype) * weight, scale


def _norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight."""
    exact = x if x.dtype == torch.float64 else x.float()
    normed = exact * scale
    grad = grad.to(exact.dtype)
    grad_x = grad_weight = None
    if need_weight:
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
    if need_x:
        grad = grad * weight
        mean = (grad * normed).mean(-1, keepdim=True)
        grad_x = grad.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)
    return grad_x, grad_weight


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


def _explicit_is_faster(query: Tensor, key: Tensor) -> bool:
    """Training short sequences on CPU, where the fused kernel's backward is slower than this one: 2-8x in bfloat16."""
    wanted = query.requires_grad or key.requires_grad
    return wanted and query.device.type == "cpu" and query.dtype != torch.float64 and key.shape[2] <= 512


def _query_blocks(s: int) -> list[tuple[int, int]]:
    """[first, last) of the queries that go together: the fewer, the less is computed only to be masked."""
    size = max(64, -(-s // 8))
    return [(first, min(first + size, s)) for first in range(0, s, size)]


class _ExplicitAttention(torch.autograd.Function):
    """Attention block by block of queries, of which a causal one reads only the keys that it may see.

    query [b, heads, s, hd]; key, value [b, kv_heads, t, hd]; mask bool [b, 1, s, t] or None for causal. The queries of
    one key head are rows of one matrix. `keep`: the probabilities, half as large as all scores of a causal one, which
    otherwise backward forms again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: bool) -> Tensor:
        batch, heads, s, head_dim = query.shape
        kv_heads, t = key.shape[1:3]
        key, value = key.contiguous(), value.contiguous()
        ctx.scale = head_dim**-0.5
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        queries, probabilities = [], []
        for first, last in _query_blocks(s):
            seen = t - s + last if mask is None else t
            rows = query[:, :, first:last].reshape(batch, kv_heads, -1, head_dim) * ctx.scale
            shares = _probabilities(
                rows, key[:, :, :seen], last - first, None if mask is None else mask[:, :, first:last]
            )
            out[:, :, first:last] = (shares @ value[:, :, :seen]).view(batch, heads, -1, head_dim)
            queries.append(rows)
            probabilities.append(shares)
        ctx.save_for_backward(key, value, mask, *queries, *(probabilities if keep else []))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        key, value, mask, *kept = ctx.saved_tensors
        s, t = grad.shape[2], key.shape[2]
        blocks = _query_blocks(s)
        grad_query = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for index, (first, last) in enumerate(blocks):
            seen, own, rows = t - s + last if mask is None else t, grad[:, :, first:last], kept[index]
            if len(kept) > len(blocks):
                shares = kept[len(blocks) + index]
            else:
                shares = _probabilities(
                    rows, key[:, :, :seen], last - first, None if mask is None else mask[:, :, first:last]
                )
            grads = own.reshape(rows.shape)
            grad_value[:, :, :seen] += shares.transpose(-1, -2) @ grads
            grad_shares = grads @ value[:, :, :seen].transpose(-1, -2)
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            grad_query[:, :, first:last] = (grad_scores @ key[:, :, :seen]).mul_(ctx.scale).view(own.shape)
            grad_key[:, :, :seen] += grad_scores.transpose(-1, -2) @ rows
        return grad_query, grad_key, grad_value, None, None


def _probabilities(rows: Tensor, key: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """softmax of rows key^T: rows [b, kv_heads, group size, hd], scaled; key [b, kv_heads, t, hd]; mask [b, 1, size, t]
    or None, where the last of the t keys is the last query's own -> [b, kv_heads, group size, t]."""
    t = key.shape[2]
    scores = (rows @ key.transpose(-1, -2)).unflatten(2, (-1, size))
    if mask is None:
        scores[..., t - size :] += torch.full((size, size), float("-inf")).triu_(1).to(scores)
    else:
        scores.masked_fill_(~mask.unsqueeze(2), float("-inf"))
    return scores.softmax(-1).flatten(2, 3)
