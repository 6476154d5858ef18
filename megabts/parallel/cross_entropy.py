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


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, tp: Axis, first: int, chunk: int = 1024
) -> Tensor:
    """Sum of the masked positions' cross-entropy, in nats (float32 scalar; float64 for float64).

    hidden [T, D]; weight [V/tp, D], rows first.. of the vocabulary; labels [T] token ids; mask [T], 1 counts and 0
    does not.
    """
    if not torch.is_grad_enabled():  # the gradient is formed in forward: evaluation must not pay for it
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, mask, tp, first, chunk)
    return loss


def linear_cross_entropies(
    hidden: Tensor, weight: Tensor, labels: Tensor, tp: Axis, first: int, chunk: int = 1024
) -> Tensor:
    """Each position's cross-entropy, in nats, [T] (float32; float64 for float64), of a head that does not train.

    hidden [T, D], labels [T] and weight as in `linear_cross_entropy`; the weight gets no gradient.
    """
    losses: Tensor = _LinearCrossEntropies.apply(hidden, weight.detach(), labels, tp, first, chunk)
    return losses


def _softmax_chunk(logits: Tensor, labels: Tensor, tp: Axis, first: int) -> tuple[Tensor, Tensor]:
    """(per-position loss [t], softmax minus one-hot [t, V/tp]); overwrites `logits` (float32)."""
    maximum = all_reduce(logits.amax(-1), tp, dist.ReduceOp.MAX)
    logits.sub_(maximum.unsqueeze(-1))
    local = labels - first
    inside = (local >= 0) & (local < logits.shape[-1])
    local = local.masked_fill(~inside, 0).unsqueeze(-1)
    target = all_reduce(logits.gather(-1, local).squeeze(-1).masked_fill(~inside, 0), tp)
    logits.exp_()
    total = all_reduce(logits.sum(-1), tp)
    logits.mul_(total.reciprocal().unsqueeze(-1))
    logits.scatter_add_(-1, local, -inside.to(logits.dtype).unsqueeze(-1))
    return total.log() - target, logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, tp: Axis, first: int, chunk: int
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            keep = mask[part].to(exact)
            logits = (hidden[part] @ weight.T).to(exact)
            losses, softmax = _softmax_chunk(logits, labels[part], tp, first)
            loss += (losses * keep).sum()
            if need_hidden or need_weight:
                grad_logits = softmax.mul_(keep.unsqueeze(-1)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
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
        return grad_hidden, grad_weight, None, None, None, None, None


class _LinearCrossEntropies(torch.autograd.Function):
    """Position by position: a row of hidden's gradient depends on its own loss alone, so backward only scales rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tp: Axis, first: int, chunk: int) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).to(exact)
            losses[part], grad_logits = _softmax_chunk(logits, labels[part], tp, first)
            if grad_hidden is not None:
                torch.mm(grad_logits.to(hidden.dtype), weight, out=grad_hidden[part])
        ctx.save_for_backward(grad_hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad_hidden,) = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype).unsqueeze(-1)
        return grad_hidden, None, None, None, None, None
