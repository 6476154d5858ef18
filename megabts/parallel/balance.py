"""Where a pipeline is cut, and what a step then takes: costs, balanced cuts and a simulation of the real schedule.

A cost is floating-point operations per token, forward and backward apart, since what is frozen has less of the second:
a layer that only runs forward costs 1, one that passes gradient through frozen weights 2, a trained one 3. What a model
costs is said above this layer (`model.costs`, `bts.costs`).

`balanced_cuts` makes the most expensive stage cheapest, which is best for many micro-batches in 1f1b. It knows neither
that interleaved ranks hold several stages, nor the start and end of a step, nor that stages with unlike shares of
forward and backward make each other wait. `fastest_cuts` starts from it and shifts boundaries while the simulated step
of the real schedule becomes shorter.

Cuts are layers before each boundary between virtual stages, ascending from 0 to L. The embedding stands before layer 0
in the first stage and the head after layer L in the last, so either may stand alone. Memory plays no part here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from megabts.errors import UsageError
from megabts.parallel.schedules import Action, ScheduleKind, build_schedule, timeline

TRIED_PASSES = 500_000
"""Simulated passes after which `fastest_cuts` looks no further: a few seconds."""


@dataclass(frozen=True)
class Cost:
    """Operations per token."""

    forward: float = 0.0
    backward: float = 0.0
    """Gradients of activations and weights, and recomputation."""

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Costs:
    """A model's parts in order; a layer counts with the stitch that follows it."""

    embedding: Cost
    layers: tuple[Cost, ...]
    head: Cost
    """Final norm, head and loss."""

    def of_stages(self, cuts: Sequence[int]) -> list[Cost]:
        """Cost of each virtual stage."""
        bounds = [0, *cuts, len(self.layers)]
        stages = [sum(self.layers[a:b], Cost()) for a, b in pairwise(bounds)]
        stages[0] += self.embedding
        stages[-1] += self.head
        return stages


@dataclass(frozen=True)
class Prediction:
    """One training step of a pipeline."""

    seconds: float
    bubble: float
    """Share of the ranks' time in which they wait."""


def equal_cuts(num_layers: int, num_stages: int) -> list[int]:
    """As many layers in each stage as in any other, one more in the first ones where they do not divide."""
    each, larger = divmod(num_layers, num_stages)
    return [stage * each + min(stage, larger) for stage in range(1, num_stages)]


def check_cuts(cuts: Sequence[int], num_layers: int, num_stages: int) -> list[int]:
    """Given cuts, as `parallel.cuts` has them. Raises UsageError if they do not cut `num_layers` in `num_stages`."""
    bounds = [0, *cuts, num_layers]
    if len(cuts) != num_stages - 1 or bounds != sorted(bounds):
        raise UsageError(
            f"parallel.cuts is {list(cuts)}; {num_stages} stages of {num_layers} layers need as many cuts as "
            f"boundaries ({num_stages - 1}), ascending from 0 to {num_layers}; mend them, or leave them "
            "out for balanced ones"
        )
    return list(cuts)


def balanced_cuts(costs: Costs, num_stages: int) -> list[int]:
    """The cuts whose most expensive stage is cheapest; of these, the ones with the most even costs, then layers.

    Exact, by dynamic programming over (stages, layers). Raises UsageError for more stages than there are parts.
    """
    length = len(costs.layers)
    if num_stages > length + 2:
        raise UsageError(
            f"parallel.pipeline x parallel.chunks is {num_stages} stages, more than embedding, {length} layers and "
            f"head are parts; use {length + 2} at most"
        )
    prefix = [0.0]
    for layer in costs.layers:
        prefix.append(prefix[-1] + layer.total)

    def cost(stage: int, first: int, last: int) -> float:
        ends = (stage == 0) * costs.embedding.total + (stage == num_stages - 1) * costs.head.total
        return prefix[last] - prefix[first] + ends

    best = [cost(0, 0, last) for last in range(length + 1)]  # the largest stage's cost with `last` layers so far
    for stage in range(1, num_stages):
        best = [
            min(max(best[first], cost(stage, first, last)) for first in range(last + 1)) for last in range(length + 1)
        ]
    return _most_even(cost, length, num_stages, best[length] * (1 + 1e-9))


def _most_even(cost: Callable[[int, int, int], float], length: int, num_stages: int, limit: float) -> list[int]:
    """Cuts with no stage above `limit` that minimise (sum of squared costs, sum of squared numbers of layers)."""
    Best = tuple[float, int, tuple[int, ...]]
    scale = limit or 1.0

    def join(head: Best, stage: int, first: int, last: int) -> Best:
        share = cost(stage, first, last) / scale
        cuts = (*head[2], first) if stage else ()
        return round(head[0] + share * share, 9), head[1] + (last - first) ** 2, cuts

    start: Best = (0.0, 0, ())
    best = {last: join(start, 0, 0, last) for last in range(length + 1) if cost(0, 0, last) <= limit}
    for stage in range(1, num_stages):
        best = {
            last: min(found)
            for last in range(length + 1)
            if (
                found := [
                    join(b, stage, a, last) for a, b in best.items() if a <= last and cost(stage, a, last) <= limit
                ]
            )
        }
    return list(best[length][2])


def fastest_cuts(
    costs: Costs, num_ranks: int, num_microbatches: int, *, schedule: ScheduleKind = "1f1b", chunks: int = 1
) -> list[int]:
    """Cuts whose simulated step is not slower than that of balanced or equal ones; messages take no time.

    Hill climbing over shifts of neighbouring boundaries by a layer, for a few seconds at most; it depends on its
    arguments alone, so every rank finds the same. Raises UsageError as `balanced_cuts` and `build_schedule` do.
    """
    length, num_stages = len(costs.layers), num_ranks * chunks
    starts = [balanced_cuts(costs, num_stages), equal_cuts(length, num_stages)]
    if num_stages == 1:
        return []

    def seconds(cuts: list[int], microbatches: int) -> float:
        return predict(
            costs, cuts, num_ranks, microbatches, tokens=1, rate=1.0, schedule=schedule, chunks=chunks
        ).seconds

    few = min(num_microbatches, 4 * num_ranks)  # tells good from bad as well as many, and is quick
    best, cuts = min((seconds(cuts, few), cuts) for cuts in starts)
    trials = TRIED_PASSES // (2 * few * num_stages)
    better: list[int] | None = cuts
    while better is not None:
        cuts, better = better, None
        for other in islice(_shifted(cuts, length), trials):
            trials -= 1
            found = seconds(other, few)
            if found < best * (1 - 1e-6):
                best, better = found, other
                break
    return min([cuts, *starts], key=lambda cuts: seconds(cuts, num_microbatches))


def _shifted(cuts: list[int], length: int) -> Iterator[list[int]]:
    """`cuts` with a run of neighbouring ones moved by a layer, in all ways that leave them cuts; short runs first."""
    for run in range(1, len(cuts) + 1):
        for first in range(len(cuts) - run + 1):
            for by in (-1, 1):
                moved = [cut + by if first <= at < first + run else cut for at, cut in enumerate(cuts)]
                bounds = [0, *moved, length]
                if bounds == sorted(bounds):
                    yield moved


def stages_with_backward(stages: Sequence[Cost]) -> tuple[bool, ...]:
    """Which virtual stages run a backward pass: the first that costs one, and all after it."""
    flags = [stage.backward > 0 for stage in stages]
    return tuple(any(flags[: k + 1]) for k in range(len(flags)))


def simulate(
    ranks: Sequence[Sequence[Action]],
    needs_backward: Sequence[bool],
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: float = 0.0,
) -> Prediction:
    """One step of all ranks' action lists.

    `forward` and `backward`: seconds of one micro-batch in each virtual stage; `transfer`: seconds of one message,
    which runs beside computation. With p equal stages and m micro-batches, 1f1b waits (p-1)/(m+p-1) of the time.
    """
    spans = timeline(ranks, needs_backward, forward, backward, transfer)
    seconds = max(span.end for rank in spans for span in rank)
    busy = sum(span.end - span.start for rank in spans for span in rank)
    return Prediction(seconds, 1 - busy / (seconds * len(ranks)))


def predict(
    costs: Costs,
    cuts: Sequence[int],
    num_ranks: int,
    num_microbatches: int,
    *,
    tokens: int,
    rate: float,
    transfer: float = 0.0,
    schedule: ScheduleKind = "1f1b",
    chunks: int = 1,
) -> Prediction:
    """One step of a model cut at `cuts`: micro-batches of `tokens` tokens, ranks that do `rate` operations a second."""
    stages = costs.of_stages(cuts)
    needs = stages_with_backward(stages)
    ranks = [build_schedule(schedule, num_ranks, r, num_microbatches, chunks, needs) for r in range(num_ranks)]
    seconds = tokens / rate
    forward, backward = (
        [cost * seconds for cost in passes] for passes in zip(*((s.forward, s.backward) for s in stages))
    )
    return simulate(ranks, needs, forward, backward, transfer)
