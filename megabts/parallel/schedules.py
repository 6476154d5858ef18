"""Pipeline schedules as data: for each rank the list of forward and backward passes, in the order it runs them.

Virtual stage k = 0 .. num_ranks * chunks - 1 holds consecutive layers and lives on rank k % num_ranks, as that rank's
chunk k // num_ranks. All functions are pure; the executor (`megabts.parallel.pipeline`), the simulation
(`megabts.parallel.balance`) and the tests walk the same lists.

    none         one micro-batch at a time: F0 B0 F1 B1 ... on every rank. Live activations 1, bubble (p-1)/p.
    1f1b         rank r runs p-r-1 forwards ahead, then alternates. Live activations min(m, p-r).
    interleaved  1f1b over `chunks` stages a rank: the bubble shrinks to 1/chunks, for chunks times the messages
                 (Narayanan et al., arXiv 2104.04473, section 2.2, with Megatron-LM's order: p micro-batches through a
                 chunk, then through the next). Micro-batches come in multiples of p.

Messages have one order for all ranks (`plan`): the time at which a run with equal stages would send them. Each rank
posts its own in that order, receives early if need be. No rank can then wait in a circle, even where a send ends only
with its receive and a rank's messages pass one after the other (NCCL: large messages, one stream for a group of ranks),
and two ranks post the messages between them alike.

Stages that need no backward (a prefix of the pipeline: nothing in or before them trains) have no backward actions and
keep nothing; they feed the others as fast as these take it. Without any backward the lists are a forward-only pass.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from megabts.errors import UsageError

ScheduleKind = Literal["none", "1f1b", "interleaved"]
Pass = Literal["forward", "backward"]


class Action(NamedTuple):
    """One pass of one micro-batch through one of the rank's chunks."""

    kind: Pass
    microbatch: int
    chunk: int


class Message(NamedTuple):
    """A hidden state (forward) or its gradient (backward) between the stages `boundary` and `boundary + 1`."""

    kind: Pass
    microbatch: int
    boundary: int
    source: int
    """Place of the sending rank on the pp axis."""
    target: int


class Step(NamedTuple):
    """Messages that a rank posts together, and the action that follows; None at the end."""

    messages: tuple[Message, ...]
    action: Action | None


class Span(NamedTuple):
    """When an action runs."""

    action: Action
    start: float
    end: float


def build_schedule(
    kind: ScheduleKind,
    num_ranks: int,
    rank: int,
    num_microbatches: int,
    chunks: int,
    needs_backward: Sequence[bool],
) -> list[Action]:
    """Actions of one rank. `needs_backward`: one flag per virtual stage, False only for a prefix of them.

    `interleaved` with one chunk is 1f1b. Raises UsageError when an interleaved schedule with backward gets a number of
    micro-batches that is no multiple of `num_ranks`.
    """
    assert 0 <= rank < num_ranks, f"rank {rank} of {num_ranks}"
    assert chunks == 1 or kind == "interleaved", f"schedule {kind} has one chunk a rank, not {chunks}"
    assert len(needs_backward) == num_ranks * chunks, "one flag per virtual stage"
    assert list(needs_backward) == sorted(needs_backward), "stages without backward are a prefix"
    if chunks > 1 and any(needs_backward) and num_microbatches % num_ranks:
        raise UsageError(
            f"parallel.schedule interleaved needs micro-batches in multiples of parallel.pipeline {num_ranks}, but "
            f"train.global_batch / (train.micro_batch x data-parallel ranks) is {num_microbatches}; change one of them "
            "or use 1f1b"
        )
    order = _order(num_ranks if chunks > 1 else 1, num_microbatches, chunks)
    forwards = [Action("forward", microbatch, chunk) for microbatch, chunk in order]
    backwards = [Action("backward", microbatch, chunks - 1 - chunk) for microbatch, chunk in order]
    ahead = min(_warm_up(kind, num_ranks, rank, chunks), len(order))
    actions = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards):
        actions += (forward, backward)
    actions += backwards[len(order) - ahead :]
    return [a for a in actions if a.kind == "forward" or needs_backward[a.chunk * num_ranks + rank]]


def received(action: Action, num_ranks: int, rank: int, needs_backward: Sequence[bool]) -> Message | None:
    """The message that this rank's `action` waits for, if any."""
    stage = action.chunk * num_ranks + rank
    if action.kind == "forward":
        return _message("forward", action.microbatch, stage - 1, num_ranks) if stage > 0 else None
    last = stage == len(needs_backward) - 1
    return None if last else _message("backward", action.microbatch, stage, num_ranks)


def sent(action: Action, num_ranks: int, rank: int, needs_backward: Sequence[bool]) -> Message | None:
    """The message that this rank's `action` ends with, if any."""
    stage = action.chunk * num_ranks + rank
    if action.kind == "backward":
        upstream = stage > 0 and needs_backward[stage - 1]
        return _message("backward", action.microbatch, stage - 1, num_ranks) if upstream else None
    last = stage == len(needs_backward) - 1
    return None if last else _message("forward", action.microbatch, stage, num_ranks)


@lru_cache(maxsize=64)
def plan(
    kind: ScheduleKind,
    num_ranks: int,
    rank: int,
    num_microbatches: int,
    chunks: int,
    needs_backward: tuple[bool, ...],
) -> tuple[Step, ...]:
    """One rank's schedule with its messages, sends as late and receives as early as their common order wants."""
    order = _message_order(kind, num_ranks, num_microbatches, chunks, needs_backward)
    messages = [message for message in order if rank in (message.source, message.target)]
    place = {message: at for at, message in enumerate(messages)}
    steps, posted = [], 0
    ended: Message | None = None
    for action in (*build_schedule(kind, num_ranks, rank, num_microbatches, chunks, needs_backward), None):
        awaited = None if action is None else received(action, num_ranks, rank, needs_backward)
        until = max([posted, *(place[message] + 1 for message in (ended, awaited) if message is not None)])
        steps.append(Step(tuple(messages[posted:until]), action))
        posted, ended = until, None if action is None else sent(action, num_ranks, rank, needs_backward)
    assert posted == len(messages), "every message belongs to an action"
    return tuple(steps)


def timeline(
    ranks: Sequence[Sequence[Action]],
    needs_backward: Sequence[bool],
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: float = 0.0,
) -> list[list[Span]]:
    """Run the ranks' schedules against each other on paper: when each action starts and ends, by rank.

    `forward` and `backward` are seconds of one micro-batch in each virtual stage, `transfer` those of one message,
    which runs beside computation. A rank starts its next action as soon as what the action waits for is there.
    """
    p, arrived = len(ranks), dict[Message, float]()
    spans: list[list[Span]] = [[] for _ in ranks]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(ranks):
            for action in actions[len(spans[rank]) :]:
                awaited = received(action, p, rank, needs_backward)
                if awaited is not None and awaited not in arrived:
                    break
                start = max(spans[rank][-1].end if spans[rank] else 0.0, arrived[awaited] if awaited else 0.0)
                seconds = forward if action.kind == "forward" else backward
                spans[rank].append(Span(action, start, start + seconds[action.chunk * p + rank]))
                message = sent(action, p, rank, needs_backward)
                if message is not None:
                    arrived[message] = spans[rank][-1].end + transfer
                moved = True
    assert all(len(done) == len(actions) for done, actions in zip(spans, ranks)), "the schedules wait in a circle"
    return spans


@lru_cache(maxsize=8)
def _message_order(
    kind: ScheduleKind, num_ranks: int, num_microbatches: int, chunks: int, needs_backward: tuple[bool, ...]
) -> tuple[Message, ...]:
    """All messages by the time at which they are sent if every pass takes a second: an order without circles."""
    p, ones = num_ranks, [1.0] * len(needs_backward)
    ranks = [build_schedule(kind, p, rank, num_microbatches, chunks, needs_backward) for rank in range(p)]
    timed = []
    for source, spans in enumerate(timeline(ranks, needs_backward, ones, ones)):
        for span in spans:
            message = sent(span.action, p, source, needs_backward)
            if message is not None:
                timed.append((span.end, source, message))
    return tuple(message for *_, message in sorted(timed, key=lambda item: item[:2]))


def _order(group: int, num_microbatches: int, chunks: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of the forwards: `group` micro-batches through each chunk in turn, then the next group."""
    return [
        (microbatch, chunk)
        for start in range(0, num_microbatches, group)
        for chunk in range(chunks)
        for microbatch in range(start, min(start + group, num_microbatches))
    ]


def _warm_up(kind: ScheduleKind, num_ranks: int, rank: int, chunks: int) -> int:
    """Forwards that a rank runs before its first backward's forward."""
    if kind == "none":
        return 0
    later = num_ranks - rank - 1
    return later if chunks == 1 else 2 * later + (chunks - 1) * num_ranks


def _message(kind: Pass, microbatch: int, boundary: int, num_ranks: int) -> Message:
    before, after = boundary % num_ranks, (boundary + 1) % num_ranks
    source, target = (before, after) if kind == "forward" else (after, before)
    return Message(kind, microbatch, boundary, source, target)
