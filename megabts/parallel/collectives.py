"""Collectives as dual pairs: the backward of each is another's forward.

    function         forward                          backward
    copy             identity                         all-reduce              into a column-split linear
    reduce           all-reduce                       identity                out of a row-split linear
    gather_sum       all-gather along dim             reduce-scatter          `copy` of a split sequence
    reduce_scatter   reduce-scatter along dim         all-gather              `reduce` to a split sequence
    gather           all-gather along dim             own slice               what every rank then uses alike
    split            own slice along dim              all-gather
    exchange         all-to-all: another dim split    all-to-all back
    send_rows        all-to-all of as many as told    all-to-all back

A rank's share of a dimension is an equal one, but for the rows of `send_rows`. The functions of the lower half
(`all_reduce`, `all_gather`, ...) are the plain versions, outside autograd. At axis size 1 each returns its input.

`enter` and `leave` bound a tensor-parallel region: whole sequences outside, or slices of them (`sequence`).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabts.parallel.mesh import Axis

# torch 2.13 has renamed them.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SEQUENCE, HIDDEN = 0, -1
"""Dimensions of a hidden state [s, b, D]."""


def copy(x: Tensor, axis: Axis) -> Tensor:
    """`x` on every rank of `axis`; gradients are summed over it."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum of the ranks' `x` over `axis`; the gradient goes to each unchanged."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather_sum(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The ranks' `x` concatenated along `dim`, for uses that differ over ranks: gradients are summed, then sliced."""
    return x if axis.size == 1 else _GatherSum.apply(x, axis, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share along `dim` of the sum of the ranks' `x`."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The ranks' `x` concatenated along `dim`, for a use that is the same on every rank."""
    return x if axis.size == 1 else _Gather.apply(x, axis, dim)


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share along `dim` of an `x` that is the same on every rank."""
    return x if axis.size == 1 else _Split.apply(x, axis, dim)


def exchange(x: Tensor, axis: Axis, split_dim: int, join_dim: int) -> Tensor:
    """All-to-all: `x`, whole along `split_dim` and a share along `join_dim`, becomes the reverse."""
    return x if axis.size == 1 else _Exchange.apply(x, axis, split_dim, join_dim)


def send_rows(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    """The first `sent[0]` rows of `x` go to rank 0 of `axis`, the next `sent[1]` to rank 1, and so on; returned are the
    rows that come here, `received[r]` of them from rank r, in the order of the ranks."""
    return x if axis.size == 1 else _SendRows.apply(x, sent, received, axis)


def enter(x: Tensor, tp: Axis, sequence: bool) -> Tensor:
    """Into a tensor-parallel region: hidden [s, b, D], or [s / tp, b, D] where `sequence`, -> [s, b, D]."""
    return gather_sum(x, tp, SEQUENCE) if sequence else copy(x, tp)


def leave(x: Tensor, tp: Axis, sequence: bool) -> Tensor:
    """Out of it: the ranks' partial sums [s, b, D] -> hidden [s, b, D], or [s / tp, b, D] where `sequence`."""
    return reduce_scatter(x, tp, SEQUENCE) if sequence else reduce(x, tp)


def to_hidden_slices(x: Tensor, tp: Axis, sequence: bool) -> Tensor:
    """Hidden [s, b, D], or [s / tp, b, D] where `sequence`, -> this rank's dimensions of it, [s, b, D / tp]."""
    return exchange(x, tp, HIDDEN, SEQUENCE) if sequence else split(x, tp, HIDDEN)


def from_hidden_slices(x: Tensor, tp: Axis, sequence: bool) -> Tensor:
    """The reverse of `to_hidden_slices`."""
    return exchange(x, tp, SEQUENCE, HIDDEN) if sequence else gather(x, tp, HIDDEN)


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` over `axis` in place and return it."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis, dim: int, sizes: list[int] | None = None) -> Tensor:
    """Concatenate the ranks' `x` along `dim`; `sizes`: the ranks' extents there, where they differ."""
    if axis.size == 1:
        return x
    sizes = sizes or [x.shape[dim]] * axis.size
    rows = x.movedim(dim, 0)
    padded = rows if len(rows) == max(sizes) else rows.new_zeros(max(sizes), *rows.shape[1:])
    if padded is not rows:  # equal shapes only
        padded[: len(rows)] = rows
    out = padded.new_empty(axis.size, *padded.shape)
    all_gather_single(out.flatten(0, 1), padded.contiguous(), group=axis.group)
    if min(sizes) == max(sizes):
        return out.flatten(0, 1).movedim(0, dim)
    return torch.cat([part[:size] for part, size in zip(out, sizes, strict=True)]).movedim(0, dim)


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """`x[r]` goes to rank r of `axis`; returned is what comes here, in the same shape, by rank."""
    return _all_to_all_rows(x, [1] * axis.size, [1] * axis.size, axis) if axis.size > 1 else x


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank; also a barrier."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank of the world, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    assert x.shape[dim] % axis.size == 0, f"{x.shape[dim]} do not divide among {axis.size} ranks"
    return x.chunk(axis.size, dim)[axis.rank].contiguous()


def _scatter_sum(x: Tensor, axis: Axis, dim: int) -> Tensor:
    assert x.shape[dim] % axis.size == 0, f"{x.shape[dim]} do not divide among {axis.size} ranks"
    rows = x.movedim(dim, 0).contiguous()
    out = rows.new_empty(len(rows) // axis.size, *rows.shape[1:])
    reduce_scatter_single(out, rows, group=axis.group)
    return out.movedim(0, dim)


def _all_to_all(x: Tensor, axis: Axis, split_dim: int, join_dim: int) -> Tensor:
    sent = torch.stack(x.chunk(axis.size, split_dim))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return torch.cat(received.unbind(0), join_dim)


def _all_to_all_rows(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out


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


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _scatter_sum(grad, ctx.axis, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _scatter_sum(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return all_gather(grad, ctx.axis, ctx.dim), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _slice(grad, ctx.axis, ctx.dim), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _slice(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return all_gather(grad, ctx.axis, ctx.dim), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, split_dim: int, join_dim: int) -> Tensor:
        ctx.axis, ctx.dims = axis, (split_dim, join_dim)
        return _all_to_all(x, axis, split_dim, join_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        split_dim, join_dim = ctx.dims
        return _all_to_all(grad, ctx.axis, join_dim, split_dim), None, None, None


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return _all_to_all_rows(x, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _all_to_all_rows(grad, ctx.received, ctx.sent, ctx.axis), None, None, None
