"""The pipeline's executor: walks a schedule's actions and moves one tensor per boundary between stages.

It knows no model. `forward(chunk, microbatch, hidden)` runs one of this rank's stages: from None on the first stage,
to the loss, a scalar, on the last, and from hidden to hidden between them.

Who sends what when: before each action a rank posts one group of messages, in the order that all ranks have in common
(`schedules.plan`): what earlier actions produced, and receives up to the one the action waits for. A hidden state's
shape is known to both sides, and one of no elements is not sent.

What is kept: of each micro-batch between its forward and its backward, the graph of its stage and the stage's input,
not its output. Stages that need no backward run without autograd and keep nothing; since nothing ever holds them up,
they wait once `SENDS_AHEAD` of their sends have not been taken.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis
from megabts.parallel.schedules import Action, Message, ScheduleKind, plan, received, sent

Forward = Callable[[int, int, Tensor | None], Tensor]
"""(chunk, micro-batch, hidden or None) -> hidden, or the loss on the last stage."""
WireShape = Callable[[int, int], Sequence[int]]
"""(boundary, micro-batch) -> shape on this rank of the hidden state that leaves virtual stage number `boundary`."""

SENDS_AHEAD = 4
"""Sends of one rank that may be under way at once."""


class Pipeline:
    """One rank's place in a pipeline of pp.size * chunks virtual stages.

    `needs_backward` has one flag per virtual stage, the same on every rank: whether anything in it or before it trains.
    Hidden states travel as `dtype` on `device`. Every rank of the axis must build it (the communicator is made here,
    before two ranks talk alone).
    """

    def __init__(
        self,
        pp: Axis,
        needs_backward: Sequence[bool],
        *,
        schedule: ScheduleKind = "1f1b",
        chunks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert len(needs_backward) == pp.size * chunks, "one flag per virtual stage"
        assert pp.size > 1 or chunks == 1, "a rank without neighbours has one chunk"
        self.pp = pp
        self.needs_backward = tuple(needs_backward)
        self.schedule = schedule
        self.chunks = chunks
        self.dtype = dtype
        self.device = torch.device(device)
        all_reduce(torch.zeros(1, device=self.device), pp)

    def run(
        self,
        num_microbatches: int,
        forward: Forward,
        wire_shape: WireShape,
        *,
        backward: bool = True,
        last_backward: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Tensor:
        """Forward and backward of `num_microbatches`; their losses, fp64 [num_microbatches], on the last stage's rank.

        Other ranks return zeros. Gradients add up in the parameters' `.grad`. `backward=False` is a forward-only pass.
        `last_backward()` is entered around the backward of each chunk's last micro-batch: gradients of that chunk's
        parameters are final when autograd has accumulated them there.
        """
        flags = self.needs_backward if backward else (False,) * len(self.needs_backward)
        wire = _Wire(self.pp, wire_shape, self.dtype, self.device)
        losses = torch.zeros(num_microbatches, dtype=torch.float64, device=self.device)
        live: dict[tuple[int, int], _Live] = {}
        for step in plan(self.schedule, self.pp.size, self.pp.rank, num_microbatches, self.chunks, flags):
            wire.post(step.messages)
            action = step.action
            if action is None:
                break
            incoming = wire.take(received(action, self.pp.size, self.pp.rank, flags))
            result: Tensor | None
            if action.kind == "forward":
                result = self._forward(action, forward, incoming, flags, live)
                if self._stage(action) == len(flags) - 1:
                    losses[action.microbatch] = result
            else:
                final = action.microbatch == num_microbatches - 1
                with last_backward() if final else nullcontext():
                    result = live.pop(action[1:]).backward(incoming)
            wire.put(sent(action, self.pp.size, self.pp.rank, flags), result)
            del incoming, result  # kept by nobody else once used or sent
        wire.finish()
        return losses

    def _stage(self, action: Action) -> int:
        return action.chunk * self.pp.size + self.pp.rank

    def _forward(
        self,
        action: Action,
        forward: Forward,
        hidden: Tensor | None,
        needs_backward: Sequence[bool],
        live: "dict[tuple[int, int], _Live]",
    ) -> Tensor:
        """Run a stage: its output, outside autograd. What its backward needs, if there will be one, goes into `live`.

        The input collects a gradient only where the stage before wants it.
        """
        stage = self._stage(action)
        if not needs_backward[stage]:
            with torch.no_grad():
                return forward(action.chunk, action.microbatch, hidden)
        if hidden is not None:
            hidden.requires_grad_(needs_backward[stage - 1])
        output = forward(action.chunk, action.microbatch, hidden)
        live[action[1:]] = _Live(hidden, output, last=stage == len(needs_backward) - 1)
        return output.detach()


class _Live:
    """One stage's micro-batch between forward and backward: the input, and the graph without the output's data."""

    def __init__(self, hidden: Tensor | None, output: Tensor, last: bool) -> None:
        self.hidden = hidden
        self.received: list[Tensor] = []
        self.root: Tensor = output if last else _Root.apply(output, self.received)

    def backward(self, gradient: Tensor | None) -> Tensor | None:
        """Backward from the output's gradient (None at the loss); the input's gradient where it has one.

        It is zeros where the output does not depend on the input, or on nothing that trains: the stage before waits.
        """
        if self.root.requires_grad:
            if gradient is not None:
                self.received.append(gradient)
            self.root.backward()
        if self.hidden is None or not self.hidden.requires_grad:
            return None
        return torch.zeros_like(self.hidden) if self.hidden.grad is None else self.hidden.grad


class _Root(torch.autograd.Function):
    """A scalar that stands for a stage's output in its graph; its backward passes on the gradient received."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, received: list[Tensor]) -> Tensor:
        ctx.received = received
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.received.pop(), None


class _Wire:
    """This rank's messages of one run: results waiting to be sent, sends and receives under way."""

    def __init__(self, pp: Axis, shape: WireShape, dtype: torch.dtype, device: torch.device) -> None:
        self.pp = pp
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.results: dict[Message, Tensor] = {}
        self.sending: deque[tuple[dist.Work, Tensor]] = deque()
        self.arriving: dict[Message, tuple[dist.Work | None, Tensor]] = {}

    def put(self, message: Message | None, result: Tensor | None) -> None:
        """Keep an action's result until `post` sends it."""
        if message is None:
            return
        assert result is not None, f"boundary {message.boundary}: nothing to send"
        found, expected = (tuple(result.shape), result.dtype), (self._shape(message), self.dtype)
        assert found == expected, f"boundary {message.boundary} carries {expected}, not {found}"
        self.results[message] = result.contiguous()

    def post(self, messages: Sequence[Message]) -> None:
        """Start one group of sends and receives."""
        operations = []
        for message in messages:
            outgoing = message.source == self.pp.rank
            if outgoing:
                tensor = self.results.pop(message)
            else:
                tensor = torch.empty(self._shape(message), dtype=self.dtype, device=self.device)
                self.arriving[message] = (None, tensor)
            if tensor.numel():
                peer = self.pp.ranks[message.target if outgoing else message.source]
                operations.append(
                    (message, dist.P2POp(dist.isend if outgoing else dist.irecv, tensor, peer, self.pp.group))
                )
        if not operations:
            return
        works = dist.batch_isend_irecv([operation for _, operation in operations])
        works = works * len(operations) if len(works) == 1 else works  # NCCL has one work for the group
        for (message, operation), work in zip(operations, works, strict=True):
            if message in self.arriving:
                self.arriving[message] = (work, operation.tensor)
            else:
                self.sending.append((work, operation.tensor))  # the buffer lives until it is sent
        self.finish(SENDS_AHEAD)

    def take(self, message: Message | None) -> Tensor | None:
        """Wait for a posted message; an empty one was not sent."""
        if message is None:
            return None
        work, tensor = self.arriving.pop(message)
        if work is not None:
            work.wait()
            self.sending = deque(item for item in self.sending if item[0] is not work)  # of one group, with NCCL
        return tensor

    def finish(self, ahead: int = 0) -> None:
        """Wait until no more than `ahead` sends are under way."""
        while len(self.sending) > ahead:
            self.sending.popleft()[0].wait()

    def _shape(self, message: Message) -> tuple[int, ...]:
        return tuple(self.shape(message.boundary, message.microbatch))
