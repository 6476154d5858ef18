"""Linears and vocabulary matrices split over the tensor-parallel axis, for the torch backend.

A column-split linear keeps rows of its weight (output features), so its output is split; a row-split linear keeps
columns (input features), so its output is a sum over ranks. The embedding and the head keep rows of the vocabulary, in
blocks of ceil(V / tp): V need not divide.

Column, then row, is a tensor-parallel region: `enter` stands before it and `leave` after it, an all-reduce forward and
one backward. Under sequence parallelism (`sequence`; Korthikanti et al., arXiv 2205.05198) hidden states outside the
regions are [s / tp, b, D]: the all-reduces become all-gathers and reduce-scatters of the same bytes, and norms and
residuals cost a tp-th. Below, s' is s / tp where `sequence`, else s.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megabts.errors import UsageError
from megabts.parallel.collectives import SEQUENCE, all_gather, all_gather_single, enter, leave, reduce_scatter_single
from megabts.parallel.cross_entropy import linear_cross_entropies, linear_cross_entropy, positions_at_once
from megabts.parallel.mesh import Axis
from megabts.parallel.ranges import Range
from megabts.parallel.sharding import ParamMeta
from megabts.runtime.fusion import Fuse, eager


def _parameter(meta: ParamMeta, tp: Axis, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(meta.local_shape(tp), dtype=dtype, device=device))


class ColumnLinear(nn.Module):
    """y = x W^T + b with W [out, in] split by rows; input whole, output split.

    `entered`: the caller has entered the region itself, for several linears that read one input.
    """

    def __init__(
        self,
        weight: ParamMeta,
        bias: ParamMeta | None,
        tp: Axis,
        dtype: torch.dtype,
        device: torch.device,
        *,
        sequence: bool = False,
        entered: bool = False,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence = sequence
        self.entered = entered
        self.metas = {"weight": weight} | ({"bias": bias} if bias else {})
        self.weight = _parameter(weight, tp, dtype, device)
        self.bias = _parameter(bias, tp, dtype, device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[s', b, in] ([s, b, in] if entered) -> [s, b, out / tp]."""
        if self.entered or self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = _EnterLinear.apply(x, self.weight, self.bias, self.tp, self.sequence)
        return out


class _EnterLinear(torch.autograd.Function):
    """`enter`, then a linear; as Megatron does it, the sum of the input's gradient runs beside the weight's gradient.

    Of a split sequence only this rank's slice is kept, and backward gathers it again beside the input's gradient: kept
    whole, these inputs would outweigh all that sequence parallelism saves (arXiv 2205.05198, section 4.2.2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis, sequence: bool) -> Tensor:
        ctx.tp, ctx.sequence = tp, sequence
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(all_gather(x, tp, SEQUENCE) if sequence else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = gathering = summing = None
        if need_weight and ctx.sequence:
            x, gathering = _start_gather(x, ctx.tp)
        if need_x:
            grad_x, summing = _start_sum(grad @ weight, ctx.tp, ctx.sequence)
        if need_weight:
            if gathering is not None:
                gathering.wait()
            grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        grad_bias = grad.flatten(0, -2).sum(0) if need_bias else None
        if summing is not None:
            summing.wait()
        return grad_x, grad_weight, grad_bias, None, None


def _start_gather(x: Tensor, tp: Axis) -> tuple[Tensor, dist.Work]:
    """[s / tp, b, D] -> [s, b, D], there once the work is done."""
    whole = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
    return whole, all_gather_single(whole, x.contiguous(), group=tp.group, async_op=True)


def _start_sum(partial: Tensor, tp: Axis, sequence: bool) -> tuple[Tensor, dist.Work]:
    """The ranks' partial sums [s, b, D] -> [s', b, D], there once the work is done; overwrites `partial`."""
    if not sequence:
        return partial, dist.all_reduce(partial, group=tp.group, async_op=True)
    share = partial.new_empty(partial.shape[0] // tp.size, *partial.shape[1:])
    return share, reduce_scatter_single(share, partial, group=tp.group, async_op=True)


class RowLinear(nn.Module):
    """y = x W^T with W [out, in] split by columns; input split, output whole.

    Raises UsageError when there are fewer columns (or heads of them) than ranks.
    """

    def __init__(
        self, weight: ParamMeta, tp: Axis, dtype: torch.dtype, device: torch.device, *, sequence: bool = False
    ) -> None:
        super().__init__()
        check_columns(weight, tp)
        self.tp = tp
        self.sequence = sequence
        self.metas = {"weight": weight}
        self.weight = _parameter(weight, tp, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in / tp] -> [s', b, out]."""
        return leave(F.linear(x, self.weight), self.tp, self.sequence)


def check_columns(weight: ParamMeta, tp: Axis) -> None:
    """Raise UsageError when ranks would hold the same columns of a row-split linear, and add their products twice."""
    if weight.local_shape(tp)[1] * tp.size != weight.shape[1]:
        units = weight.shape[1] // weight.unit
        raise UsageError(f"parallel.tensor {tp.size} is more than the {units} heads or columns there are to share")


class Vocabulary(nn.Module):
    """A matrix [V, D] with a row for each token id, split by rows: the embedding, the head, or both when tied.

    Raises UsageError when a rank would hold no row.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        std: float,
        tp: Axis,
        dtype: torch.dtype,
        device: torch.device,
        *,
        sequence: bool = False,
        fuse: Fuse = eager,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence = sequence
        self.fuse = fuse
        self.sizes = [b - a for a, b in (vocab_range(vocab_size, replace(tp, rank=r)) for r in range(tp.size))]
        if 0 in self.sizes:
            raise UsageError(f"parallel.tensor {tp.size} is too much for a vocabulary of {vocab_size}: a rank has none")
        self.first = vocab_range(vocab_size, tp)[0]
        self.chunk = positions_at_once(max(self.sizes), device)  # of the largest rank: chunks meet in collectives
        meta = VocabMeta((vocab_size, hidden_size), "normal", std, dim=0)
        self.metas = {"weight": meta}
        self.weight = _parameter(meta, tp, dtype, device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows of the token ids [s, b] -> [s', b, D]."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        outside = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(outside, 0), self.weight)
        return leave(rows.masked_fill(outside.unsqueeze(-1), 0), self.tp, self.sequence)

    def logits(self, hidden: Tensor) -> Tensor:
        """[s', b, D] -> logits [s, b, V], gathered; outside autograd over more than one rank."""
        hidden = enter(hidden, self.tp, self.sequence)
        return all_gather(F.linear(hidden, self.weight), self.tp, -1, self.sizes)

    def loss(self, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Sum of the cross-entropy in nats over positions; hidden [s', b, D], labels and mask [s, b]."""
        hidden = enter(hidden, self.tp, self.sequence).flatten(0, 1)
        return linear_cross_entropy(
            hidden, self.weight, labels.flatten(), mask.flatten(), self.tp, self.first, chunk=self.chunk, fuse=self.fuse
        )

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats of each position [s, b], of a frozen matrix; hidden [s', b, D], labels [s, b]."""
        hidden = enter(hidden, self.tp, self.sequence).flatten(0, 1)
        losses = linear_cross_entropies(
            hidden, self.weight, labels.flatten(), self.tp, self.first, chunk=self.chunk, fuse=self.fuse
        )
        return losses.view(labels.shape)


class VocabMeta(ParamMeta):
    """A [V, D] parameter split by rows in blocks of ceil(V / tp), the last one shorter."""

    def slices(self, axis: Axis) -> list[Range]:
        """The one block of rows that `axis.rank` holds."""
        return [vocab_range(self.shape[0], axis)]

    def _shared_rows(self, axis: Axis, *, first_holder_too: bool) -> list[Range]:
        return []


def vocab_range(vocab_size: int, tp: Axis) -> Range:
    """Rows [first, last) of the vocabulary on this rank."""
    block = -(-vocab_size // tp.size)
    return min(tp.rank * block, vocab_size), min((tp.rank + 1) * block, vocab_size)


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """No gradients for these: autograd then keeps no inputs of their linears and computes no weight gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
