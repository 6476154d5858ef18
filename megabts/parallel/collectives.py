"""Collectives as dual pairs: the backward of each is the other's forward.

    copy    forward: identity      backward: all-reduce      (into a column-split linear)
    reduce  forward: all-reduce    backward: identity        (out of a row-split linear)

`all_reduce` and `all_gather` are the plain versions, outside autograd. At axis size 1 each returns its input.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabts.parallel.mesh import Axis


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` over `axis` in place and return it."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis, dim: int, sizes: list[int]) -> Tensor:
    """Concatenate the ranks' `x` along `dim`; `sizes` are the ranks' extents there (they may differ)."""
    if axis.size == 1:
        return x
    rows = x.movedim(dim, 0)
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # gloo gathers equal shapes only
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=axis.group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def copy(x: Tensor, axis: Axis) -> Tensor:
    """`x` on every rank of `axis`; gradients are summed over it."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum of the ranks' `x` over `axis`; the gradient goes to each unchanged."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank; also a barrier."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
