"""What a stitch does to states once projections and gate logits are there: dropout, softmax or sigmoid, mixing.

Each is one function forward and one backward, which `fuse` may compile to one pass over memory. Backward forms the
gates again from their logits, so that nothing is kept but logits and states.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from megabts.bts.placement import ALONE
from megabts.parallel.mesh import Axis
from megabts.runtime.fusion import Fuse, eager

LEVELS = 1 << 16
"""Of a dropout mask's random numbers: its probability is a multiple of 1 / LEVELS."""


def experts_into_hub(hub: Tensor, projected: Sequence[Tensor], gates: Sequence[Tensor] | Tensor) -> Tensor:
    """The hub's new state: sum of gates [n+1, .., D] times (hub, *projected), each [.., D]."""
    mixed = gates[0] * hub
    for gate, state in zip(gates[1:], projected, strict=True):
        mixed = torch.addcmul(mixed, gate, state)
    return mixed


def hub_into_experts(expert: Tensor, projected_hub: Tensor, gate: Tensor) -> Tensor:
    """An expert's new state: (1 - gate) * expert + gate * projected hub, each [.., D]."""
    return torch.lerp(expert, projected_hub, gate)


def softmax_mix(logits: Sequence[Tensor], states: Sequence[Tensor], fuse: Fuse = eager) -> Tensor:
    """`experts_into_hub` of states (hub, *projected) with the softmax of their gates' logits; each [.., D]."""
    out: Tensor = _SoftmaxMix.apply(fuse, len(logits), *logits, *states)
    return out


def sigmoid_mix(logit: Tensor, expert: Tensor, projected_hub: Tensor, fuse: Fuse = eager) -> Tensor:
    """`hub_into_experts` with the sigmoid of the gate's logit; each [.., D]."""
    out: Tensor = _SigmoidMix.apply(logit, expert, projected_hub, fuse)
    return out


def gate_dropout(
    logits: Tensor, probability: float, seeds: Sequence[int] | None, tp: Axis = ALONE, fuse: Fuse = eager
) -> Tensor:
    """Dropout on gate logits [s, b, D / tp]; the mask of sample j depends on seeds[j] alone. None or 0 changes nothing.

    The mask of all D dimensions is drawn and this rank's slice taken, so that it is the same at every degree. What is
    kept is scaled by the inverse of how often that really happens: at least once in LEVELS.
    """
    if seeds is None or probability == 0:
        return logits
    s, b, width = logits.shape
    whole = width * tp.size
    words = torch.empty(b, -(-s * whole // 4), dtype=torch.int64, device=logits.device)  # four numbers in each
    for sample, seed in enumerate(seeds):
        words[sample].random_(-(1 << 63), None, generator=torch.Generator(logits.device).manual_seed(seed))
    noise = words.view(torch.int16)[:, : s * whole].view(b, s, whole).transpose(0, 1)
    noise = noise[..., tp.rank * width : (tp.rank + 1) * width]
    dropped = min(round(probability * LEVELS), LEVELS - 1)
    out: Tensor = _Dropout.apply(logits, noise, dropped - LEVELS // 2, LEVELS / (LEVELS - dropped), fuse)
    return out


def _gates(logits: Sequence[Tensor]) -> Sequence[Tensor]:
    """Their softmax over members, in fp32 at least."""
    if not torch.compiler.is_compiling():
        exact_type = torch.promote_types(logits[0].dtype, torch.float32)
        return torch.stack(list(logits)).softmax(0, dtype=exact_type).unbind(0)
    exact = [logit if logit.dtype == torch.float64 else logit.float() for logit in logits]  # one pass: nothing stacked
    maximum = reduce(torch.maximum, exact)
    exponentials = [(logit - maximum).exp() for logit in exact]
    scale = reduce(torch.add, exponentials).reciprocal()
    return [exponential * scale for exponential in exponentials]


def _softmax_mix(first: Tensor, logits: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    return experts_into_hub(states[0], states[1:], _gates(logits)).to(first.dtype)


def _softmax_mix_backward(
    grad: Tensor, logits: Sequence[Tensor], states: Sequence[Tensor], need_logits: bool, need_states: tuple[bool, ...]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of logits and states. Members that were one once are alike: their differences, which the logits'
    gradients are, would be lost in 16 bits."""
    gates = _gates(logits)
    of_states = [(grad * gate).to(grad.dtype) if need else None for gate, need in zip(gates, need_states, strict=True)]
    if not need_logits:
        return [None] * len(logits), of_states
    mixed = experts_into_hub(states[0], states[1:], gates)
    pairs = zip(gates, states, strict=True)
    of_logits = [(state - mixed).mul_(gate).mul_(grad).to(grad.dtype) for gate, state in pairs]
    return [*of_logits], of_states


class _SoftmaxMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fuse: Fuse, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.fuse, ctx.count = fuse, count
        return fuse(_softmax_mix)(tensors[0], tensors[:count], tensors[count:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, states = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needs = ctx.needs_input_grad[2:]
        of_logits, of_states = ctx.fuse(_softmax_mix_backward)(
            grad, logits, states, any(needs[: ctx.count]), needs[ctx.count :]
        )
        return None, None, *of_logits, *of_states


def _sigmoid_mix(logit: Tensor, expert: Tensor, projected_hub: Tensor) -> Tensor:
    return hub_into_experts(expert, projected_hub, logit.sigmoid())


def _sigmoid_mix_backward(
    grad: Tensor, logit: Tensor, expert: Tensor, projected_hub: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gate = logit.sigmoid()
    of_projected = grad * gate
    of_expert = grad - of_projected
    return (projected_hub - expert) * of_projected * (1 - gate), of_expert, of_projected


class _SigmoidMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logit: Tensor, expert: Tensor, projected_hub: Tensor, fuse: Fuse) -> Tensor:
        ctx.save_for_backward(logit, expert, projected_hub)
        ctx.fuse = fuse
        return fuse(_sigmoid_mix)(logit, expert, projected_hub)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*ctx.fuse(_sigmoid_mix_backward)(grad, *ctx.saved_tensors), None)


def _dropped(x: Tensor, noise: Tensor, threshold: int, scale: float) -> Tensor:
    return torch.where(noise >= threshold, x * scale, 0).contiguous()  # noise has samples first; linears want x's order


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Tensor, threshold: int, scale: float, fuse: Fuse) -> Tensor:
        ctx.save_for_backward(noise)
        ctx.settings, ctx.fuse = (threshold, scale), fuse
        return fuse(_dropped)(x, noise, threshold, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.fuse(_dropped)(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None
