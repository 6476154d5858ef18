"""Members on several ranks: who holds whom, and how hidden states pass between them at a stitch.

Members are cut contiguously over the expert-parallel axis, the hub on rank 0; the last ranks take the remainder, since
rank 0 also runs the head. At a stitch the ranks meet in a few exchanges, each with its dual as backward:

    exchange     forward                                   backward
    broadcast    the hub's state to every rank             gradients summed to the hub
    gather       projected states to the hub               each rank's gradients sent back
    add          sums of all ranks' parts to the hub       the hub's gradient broadcast

`maximum` has no backward (it shifts a softmax and cancels). An expert rank has no loss: its graph ends in a *token*, an
empty tensor that passes through all exchanges of a forward pass and then into the hidden state that leaves it. So every
rank runs the backward of every exchange, in one order, whatever trains where; which exchanges have one at all follows
from `flow` and is the same on every rank.

Bytes, sent and received together, in units of one hidden state, P = ep ranks and f = (P - 1) / P < 1:

    collective             how                                        hub's rank    another rank
    broadcast              scatter, then ring all-gather (gloo)       3 f           f + 1
    add (one state)        ring reduce-scatter, gather to the hub     3 f           f + 1
    maximum                ring all-reduce                            4 f           4 f
    gather (n experts)     point to point                             n             its experts

gloo's own broadcast is a tree whose root sends log2 P states; NCCL's is a ring, and is used. Of a stitch in training:

    Hub-into-Experts             broadcast forward, add backward                               6 f     2 f + 2
    Experts-into-Hub, gather     p_i to the hub, gradients back                                2 n     2 an expert
    Experts-into-Hub, reduce     broadcast h_0, maximum, add numerator and denominator (two    22 f    10 f + 6
                                 states); backward: broadcast two states, add h_0's gradient

The reduce version's bytes per rank do not grow with n, nor does its work on the hub's rank: every rank computes the
gate logits of its own members. Under tensor parallelism projected states, numerators and denominators are slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megabts.bts.plan import Kind
from megabts.parallel.collectives import all_gather, all_reduce
from megabts.parallel.mesh import Axis

Exchange = Literal["auto", "gather", "reduce"]
ALONE = Axis("ep")
"""All members on one rank."""
FEW_EXPERTS = 3
"""Up to so many experts `auto` gathers their projected states."""


def local_members(num_members: int, ep: Axis) -> range:
    """Numbers of the members on this rank: shares that differ by one at most, the larger ones last.

    Every rank has one at least: `num_members` must not be less than `ep.size`.
    """
    assert num_members >= ep.size, f"{num_members} members do not fill {ep.size} ranks"
    each, larger = divmod(num_members, ep.size)
    smaller = ep.size - larger
    start = ep.rank * each + max(0, ep.rank - smaller)
    return range(start, start + each + (ep.rank >= smaller))


@dataclass(frozen=True)
class Placement:
    """Which of a model's members are on which rank, and how Experts-into-Hub stitches meet."""

    members: tuple[str, ...]
    """All, the hub first."""
    ep: Axis
    exchange: Literal["gather", "reduce"]

    @classmethod
    def of(cls, members: Sequence[str], ep: Axis, exchange: Exchange = "auto") -> "Placement":
        """With the exchange settled: on one rank, and by choice with few experts, it is gather."""
        few = len(members) - 1 <= FEW_EXPERTS
        gathers = ep.size == 1 or exchange == "gather" or (exchange == "auto" and few)
        return cls(tuple(members), ep, "gather" if gathers else "reduce")

    @property
    def counts(self) -> list[int]:
        """Number of members on each rank."""
        shares = (local_members(len(self.members), Axis("ep", self.ep.size, rank)) for rank in range(self.ep.size))
        return [len(share) for share in shares]

    @property
    def expert_counts(self) -> list[int]:
        """Number of experts on each rank."""
        return [self.counts[0] - 1, *self.counts[1:]]

    @property
    def local(self) -> tuple[str, ...]:
        """Members of this rank."""
        share = local_members(len(self.members), self.ep)
        return self.members[share.start : share.stop]

    @property
    def experts(self) -> tuple[str, ...]:
        """Experts of this rank."""
        return self.local[self.has_hub :]

    @property
    def has_hub(self) -> bool:
        """Whether this is the hub's rank."""
        return self.ep.rank == 0

    def gated(self, kind: Kind) -> tuple[str, ...]:
        """Members whose gate slices of a stitch are on this rank: its own, or all on the hub's rank, which gathers."""
        if kind == "hub_into_experts":
            return self.experts
        if self.exchange == "reduce":
            return self.local
        return self.members if self.has_hub else ()


class Exchanges:
    """The exchanges of one forward pass, in order, bound by their token.

    `enter` it with the hidden state that begins the pass, `leave` with the one that ends it. `backward` says of each
    exchange whether it has one: it must be the same on every rank.
    """

    def __init__(self, ep: Axis) -> None:
        self.ep = ep
        self._token: Tensor | None = None

    def enter(self, hidden: Tensor) -> Tensor:
        """`hidden`; where it carries the exchanges of an earlier pass, those of this one follow them."""
        if self.ep.size > 1 and torch.is_grad_enabled() and hidden.requires_grad:
            hidden, self._token = _Untie.apply(hidden)
        return hidden

    def leave(self, hidden: Tensor) -> Tensor:
        """`hidden`, whose backward pass now reaches every exchange."""
        return hidden if self._token is None else _Tie.apply(hidden, self._token)

    def begin_backward(self, like: Tensor) -> None:
        """From here on hidden states (of dtype and device of `like`) have a backward pass, on every rank alike."""
        if self.ep.size > 1 and torch.is_grad_enabled() and self._token is None:
            self._token = like.new_zeros(0).requires_grad_()

    def broadcast(self, state: Tensor, backward: bool) -> Tensor:
        """The hub's `state` on every rank; on the others `state` only lends its shape."""
        if self.ep.size == 1:
            return state
        if self._starts(backward, state):
            out, self._token = _Broadcast.apply(state if self.ep.rank == 0 else state.detach(), self._token, self.ep)
            return out
        return broadcast(state.detach(), self.ep)

    def gather(self, states: Tensor, counts: Sequence[int], returns: Sequence[bool]) -> Tensor:
        """[its own, ..] of every rank, in order, on the hub's rank; elsewhere nothing.

        `counts`: how many each rank has; `returns`: whether a rank's states need a gradient.
        """
        if self.ep.size == 1:
            return states
        if self._starts(any(returns), states):
            out, self._token = _Gather.apply(states, self._token, self.ep, counts, returns)
            return out
        return _gather(states.detach(), self.ep, counts)

    def add(self, parts: Tensor, backward: bool) -> Tensor:
        """The sum of the ranks' `parts` on the hub's rank; elsewhere nothing of use."""
        if self.ep.size == 1:
            return parts
        if self._starts(backward, parts):
            out, self._token = _Add.apply(parts, self._token, self.ep)
            return out
        return _add(_copy(parts.detach()), self.ep)

    @torch.no_grad()
    def maximum(self, x: Tensor) -> Tensor:
        """The largest of the ranks' `x`, element by element, on every rank; `x` is overwritten."""
        return all_reduce(x, self.ep, dist.ReduceOp.MAX)

    def _starts(self, backward: bool, like: Tensor) -> bool:
        if backward:
            self.begin_backward(like)
        return backward and self._token is not None


def broadcast(x: Tensor, ep: Axis) -> Tensor:
    """A new tensor: the hub rank's `x`; the others' lends its shape. Outside autograd."""
    if dist.get_backend(ep.group) != "gloo":
        out = _copy(x) if ep.rank == 0 else torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.broadcast(out, src=ep.ranks[0], group=ep.group)
        return out
    share = -(-x.numel() // ep.size)
    mine = x.new_empty(share)
    shares = None
    if ep.rank == 0:
        padded = x.new_zeros(share * ep.size)
        padded[: x.numel()] = x.flatten()
        shares = list(padded.chunk(ep.size))
    dist.scatter(mine, shares, src=ep.ranks[0], group=ep.group)
    return all_gather(mine, ep, 0)[: x.numel()].view(x.shape)


def _add(x: Tensor, ep: Axis) -> Tensor:
    """Sum of the ranks' `x` to the hub's rank, in place."""
    dist.reduce(x, dst=ep.ranks[0], group=ep.group)
    return x


def _gather(x: Tensor, ep: Axis, counts: Sequence[int]) -> Tensor:
    if ep.rank > 0:
        _transfer([dist.P2POp(dist.isend, x.contiguous(), ep.ranks[0], ep.group)])
        return x.new_empty(0)
    out = x.new_empty(sum(counts), *x.shape[1:])
    parts = out.split(list(counts))
    parts[0].copy_(x)
    _transfer([dist.P2POp(dist.irecv, parts[rank], ep.ranks[rank], ep.group) for rank in range(1, ep.size)])
    return out


def _return(grad: Tensor, ep: Axis, counts: Sequence[int], returns: Sequence[bool]) -> None:
    """From the hub's rank, the gradients of the states that came from elsewhere."""
    parts = grad.contiguous().split(list(counts))
    to = [rank for rank in range(1, ep.size) if returns[rank]]
    _transfer([dist.P2POp(dist.isend, parts[rank], ep.ranks[rank], ep.group) for rank in to])


def _transfer(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, token: Tensor, ep: Axis) -> tuple[Tensor, Tensor]:
        ctx.ep = ep
        sent = broadcast(state, ep)
        return (state.view_as(state) if ep.rank == 0 else sent), token.view_as(token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, token: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        total = _add(_copy(grad), ctx.ep)
        return total if ctx.ep.rank == 0 else None, token, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, token: Tensor, ep: Axis, counts: Sequence[int], returns: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        ctx.ep, ctx.counts, ctx.returns = ep, counts, returns
        ctx.shape, ctx.options = states.shape, {"dtype": states.dtype, "device": states.device}
        return _gather(states, ep, counts), token.view_as(token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, token: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ep: Axis = ctx.ep
        if ep.rank == 0:
            _return(grad, ep, ctx.counts, ctx.returns)
            return grad[: ctx.counts[0]], token, None, None, None
        if not ctx.returns[ep.rank]:
            return None, token, None, None, None
        mine = torch.empty(ctx.shape, **ctx.options)
        _transfer([dist.P2POp(dist.irecv, mine, ep.ranks[0], ep.group)])
        return mine, token, None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, token: Tensor, ep: Axis) -> tuple[Tensor, Tensor]:
        ctx.ep = ep
        return _add(_copy(parts), ep), token.view_as(token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, token: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        mine = broadcast(grad, ctx.ep)
        return mine if ctx.needs_input_grad[0] else None, token, None


class _Untie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.view_as(hidden), hidden.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad.new_zeros(0)
