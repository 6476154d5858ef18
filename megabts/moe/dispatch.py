"""Tokens on their way to the ffn experts that they chose, on whatever rank, and back; none is dropped.

A rank of the mesh axis `experts` holds N / ep of a layer's ffn experts, in order. Who sends what when:

    sizes     [ep, N / ep] counts to every rank: how many of my choices fall on each of its ffn experts
    out       a row for each choice, [T k, D], sorted by ffn expert and so by rank; what comes is sorted once more, as
              it lies rank after rank
    home      the ffn experts' outputs, back the same way

With soft routing every token goes to every rank once, with its weights there, and a weighted sum comes back.

Sorting is a permutation; its backward is the reverse one, not a sum over scattered rows, so that equal inputs give
equal bits on any device. Backward sends gradients the opposite ways. Every rank of the axis must run the same layers in
the same order; how many tokens come to a rank, none included, changes nothing in that. At degree 1 nothing is sent, and
the sizes stay on the device until somebody asks for them.
"""

from typing import Any

import torch
from torch import Tensor

from megabts.parallel.collectives import all_to_all, send_rows
from megabts.parallel.mesh import Axis
from megabts.parallel.ranges import Range


def held_by(experts: Axis, num_ffn_experts: int) -> Range | None:
    """The ffn experts [first, last) of a rank of `experts`; None: all, at degree 1."""
    assert num_ffn_experts % experts.size == 0, f"{num_ffn_experts} ffn experts among {experts.size} ranks"
    each = num_ffn_experts // experts.size
    return (experts.rank * each, (experts.rank + 1) * each) if experts.size > 1 else None


class Dispatch:
    """The journey of one micro-batch's tokens, which chose `chosen` [T, k] of N ffn experts.

    Attributes:
        counts: rows for each of this rank's ffn experts, int64 [N / ep], where the model is.
    """

    def __init__(self, chosen: Tensor, num_ffn_experts: int, experts: Axis) -> None:
        self.axis, self.k = experts, chosen.shape[1]
        self.order = chosen.flatten().argsort(stable=True)  # of the T k choices, token after token
        self.back = self.order.argsort()
        mine = chosen.new_zeros(num_ffn_experts).scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        self.counts = mine
        if experts.size == 1:
            return
        sizes = mine.view(experts.size, -1)  # by rank and its ffn experts
        theirs = all_to_all(sizes, experts)
        self.sent, self.received = torch.stack([sizes.sum(1), theirs.sum(1)]).tolist()
        self.counts = theirs.sum(0)
        which = torch.arange(len(self.counts), device=chosen.device).repeat(experts.size)
        self.regroup = which.repeat_interleave(theirs.flatten(), output_size=sum(self.received)).argsort(stable=True)
        self.ungroup = self.regroup.argsort()

    def out(self, hidden: Tensor) -> Tensor:
        """Tokens [T, D] -> rows for this rank's ffn experts, one after the other, [counts.sum(), D]."""
        rows: Tensor = _Deal.apply(hidden, self.order, self.back, self.k)
        if self.axis.size == 1:
            return rows
        rows = send_rows(rows, self.sent, self.received, self.axis)
        return _permute(rows, self.regroup, self.ungroup)

    def home(self, outputs: Tensor) -> Tensor:
        """Outputs for these rows -> for every token those of the ffn experts it chose, [T, k, D]."""
        if self.axis.size > 1:
            outputs = send_rows(_permute(outputs, self.ungroup, self.regroup), self.received, self.sent, self.axis)
        return _permute(outputs, self.back, self.order).unflatten(0, (-1, self.k))


class Broadcast:
    """The journey of `num_tokens` tokens that all go everywhere; ranks may have different numbers of them."""

    def __init__(self, num_tokens: int, device: torch.device, experts: Axis) -> None:
        self.axis = experts
        self.sent = self.received = [num_tokens] * experts.size
        if experts.size > 1:
            self.received = all_to_all(torch.tensor(self.sent, device=device), experts).tolist()

    def out(self, x: Tensor) -> Tensor:
        """[ep or 1, T, ..], a part for each rank or one for all, -> what came here, rank after rank, [T', ..]."""
        whole = x.expand(self.axis.size, *x.shape[1:]).flatten(0, 1)
        return send_rows(whole, self.sent, self.received, self.axis)

    def home(self, outputs: Tensor) -> Tensor:
        """[T', D] -> the sum over the ranks of what they made of this rank's tokens, [T, D]."""
        return send_rows(outputs, self.received, self.sent, self.axis).unflatten(0, (self.axis.size, -1)).sum(0)


def _permute(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    rows: Tensor = _Permute.apply(x, order, back)
    return rows


class _Deal(torch.autograd.Function):
    """Row i of the result is the token that choice order[i] belongs to: [T, D] -> [T k, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad[back].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """x[order], where order[back] counts up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad[back], None, None
