"""Next-token loss straight from the hidden states: head and cross-entropy in one, in chunks of positions.

The logits of all positions never exist at once, and over tensor-parallel ranks they are never gathered: each rank
holds its part of the vocabulary, and three small all-reduces (maximum, sum of exponentials, the target's logit) make
the softmax exact. The gradient with respect to hidden states and head is formed chunk by chunk in forward, where the
softmax is at hand, and only scaled in backward; nothing else is kept. Of hidden's gradient a rank has the part of its
rows of the head: the caller gets hidden from `collectives.enter`, whose backward adds the parts up.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis
from megabts.runtime.fusion import Fuse, eager

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Logits that exist at one time: on CPU few enough for its caches, on a GPU enough to keep it busy."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    tp: Axis,
    first: int,
    *,
    chunk: int = 1024,
    fuse: Fuse = eager,
) -> Tensor:
    """Sum of the masked positions' cross-entropy, in nats (float32 scalar; float64 for float64).

    hidden [T, D]; weight [V/tp, D], rows first.. of the vocabulary; labels [T] token ids; mask [T], 1 counts and 0
    does not. `chunk`: positions at one time, the same on every rank (`positions_at_once`).
    """
    if not torch.is_grad_enabled():  # the gradient is formed in forward: evaluation must not pay for it
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, mask, tp, first, chunk, fuse)
    return loss


def linear_cross_entropies(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp: Axis,
    first: int,
    *,
    chunk: int = 1024,
    fuse: Fuse = eager,
) -> Tensor:
    """Each position's cross-entropy, in nats, [T] (float32; float64 for float64), of a head that does not train.

    hidden [T, D], labels [T] and weight as in `linear_cross_entropy`; the weight gets no gradient.
    """
    losses: Tensor = _LinearCrossEntropies.apply(hidden, weight.detach(), labels, tp, first, chunk, fuse)
    return losses


def positions_at_once(rows: int, device: torch.device) -> int:
    """Positions whose logits exist at one time, where no rank has more than so many rows of the vocabulary."""
    return max(128, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // rows)


class _Softmax:
    """Softmax of a chunk of positions: each one's loss, then the gradient of its logits."""

    def __init__(self, logits: Tensor, labels: Tensor, tp: Axis, first: int, fuse: Fuse) -> None:
        """logits [t, V/tp] of the rows first.. of the vocabulary, labels [t]."""
        self.dtype, self.fuse = logits.dtype, fuse
        local = labels - first
        inside = (local >= 0) & (local < logits.shape[-1])
        self.local = local.masked_fill(~inside, 0)
        self.inside = inside.to(_exact(logits))
        maximum = all_reduce(logits.amax(-1), tp, dist.ReduceOp.MAX).to(self.inside.dtype)
        target = logits.gather(-1, self.local.unsqueeze(-1)).squeeze(-1).to(maximum.dtype) - maximum
        target = all_reduce(target * self.inside, tp)
        self.exponentials, total = fuse(_exponentials)(logits, maximum)
        self.total = all_reduce(total, tp)
        self.losses = self.total.log() - target

    def gradient(self, keep: Tensor) -> Tensor:
        """Softmax minus one-hot, times keep [t]: [t, V/tp]."""
        rows = torch.arange(len(self.local), device=keep.device)
        own = self.exponentials[rows, self.local] / self.total
        grad = self.fuse(_scaled)(self.exponentials, keep / self.total, self.dtype)
        exact = ((own - self.inside) * keep).to(self.dtype)  # rounded once
        grad[rows, self.local] = torch.where(self.inside > 0, exact, grad[rows, self.local])
        return grad


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _exponentials(logits: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - maximum) and its sum over the vocabulary, in fp32."""
    exponentials = (logits.to(maximum.dtype) - maximum.unsqueeze(-1)).exp_()
    return exponentials, exponentials.sum(-1)


def _scaled(exponentials: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (exponentials * scale.unsqueeze(-1)).to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor,
        tp: Axis,
        first: int,
        chunk: int,
        fuse: Fuse,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        exact = _exact(hidden)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            keep = mask[part].to(exact)
            softmax = _Softmax(hidden[part] @ weight.T, labels[part], tp, first, fuse)
            loss += (softmax.losses * keep).sum()
            if need_hidden or need_weight:
                grad_logits = softmax.gradient(keep)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _LinearCrossEntropies(torch.autograd.Function):
    """Position by position: a row of hidden's gradient depends on its own loss alone, so backward only scales rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tp: Axis, first: int, chunk: int, fuse: Fuse
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(hidden), dtype=_exact(hidden), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            softmax = _Softmax(hidden[part] @ weight.T, labels[part], tp, first, fuse)
            losses[part] = softmax.losses
            if grad_hidden is not None:
                torch.mm(softmax.gradient(torch.ones_like(softmax.losses)), weight, out=grad_hidden[part])
        ctx.save_for_backward(grad_hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad_hidden,) = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype).unsqueeze(-1)
        return grad_hidden, None, None, None, None, None, None
