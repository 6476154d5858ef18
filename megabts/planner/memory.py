"""What the fullest rank of a layout holds: bytes by kind.

    parameters    of the rank's part of the model, frozen ones too
    gradients     4 bytes for each that trains: the flat fp32 buffer (parallel.ddp)
    optimizer     12 bytes for each that trains, over the ranks that hold it: masters and two moments (optimizer.adamw)
    activations   what autograd keeps of the micro-batches that are between forward and backward at once, which the
                  pipeline's real schedule says
    buffers       the largest bucket in the parameters' precision (their all-gather), messages between stages, what the
                  heaviest part needs while it runs, and what the GPU takes before any tensor

Parts are summed from the planner's `Work`; the shapes of parameters are those of the real modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megabts.config.run import RunConfig
from megabts.parallel.pipeline import SENDS_AHEAD
from megabts.parallel.schedules import ScheduleKind, build_schedule
from megabts.planner.gpus import RESERVED
from megabts.planner.work import Parts, Work, state_bytes, value_bytes

GRADIENT_BYTES, OPTIMIZER_BYTES = 4, 12


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def fullest_rank(
    config: RunConfig,
    ranks: Sequence[Parts],
    stages: Sequence[Sequence[Work]],
    needs_backward: tuple[bool, ...],
    num_microbatches: int,
    dp: int,
    shared_dp: int = 1,
) -> Memory:
    """The rank of the pipeline and expert axes with the most bytes.

    `ranks`: parts by expert-parallel rank; `stages`: their `Parts.stages`; `shared_dp`: expert-parallel ranks that are
    data-parallel in what is not `Work.spread`.
    """
    found = [
        rank_memory(config, parts, works, needs_backward, num_microbatches, dp, pp_rank, shared_dp)
        for parts, works in zip(ranks, stages, strict=True)
        for pp_rank in range(config.parallel.pipeline)
    ]
    return max(found, key=lambda memory: memory.total)


def rank_memory(
    config: RunConfig,
    parts: Parts,
    stages: Sequence[Work],
    needs_backward: tuple[bool, ...],
    num_microbatches: int,
    dp: int,
    pp_rank: int,
    shared_dp: int = 1,
) -> Memory:
    """Bytes on one rank, of whose pipeline `stages` are all virtual stages."""
    pp, value = config.parallel.pipeline, value_bytes(config)
    mine, flags = stages[pp_rank::pp], needs_backward[pp_rank::pp]
    work = sum(mine, Work())
    copy = parts.tied if 0 < pp_rank == pp - 1 else 0
    trainable = work.trainable + (copy if parts.head.trainable else 0)
    message = parts.states * state_bytes(config) if pp > 1 else 0.0
    kept = [stage.kept if flag else 0.0 for stage, flag in zip(mine, flags, strict=True)]
    return Memory(
        parameters=(work.parameters + copy) * value,
        gradients=trainable * GRADIENT_BYTES,
        optimizer=((trainable - work.spread) / shared_dp + work.spread) * OPTIMIZER_BYTES / dp,
        activations=peak_kept(config, needs_backward, num_microbatches, pp_rank, kept),
        buffers=_gathered(config, parts, trainable, dp * shared_dp) * value
        + message * (3 if flags[0] else SENDS_AHEAD + 1)
        + work.working
        + RESERVED,
    )


def peak_kept(
    config: RunConfig, needs_backward: tuple[bool, ...], num_microbatches: int, pp_rank: int, kept: Sequence[float]
) -> float:
    """The most bytes that a rank's micro-batches keep at once; `kept`: those of one, by chunk."""
    parallel = config.parallel
    seen = min(num_microbatches, 4 * parallel.pipeline)  # by then the schedule repeats itself
    counts = live_counts(parallel.schedule, parallel.pipeline, pp_rank, seen, parallel.chunks, needs_backward)
    return max(sum(live * size for live, size in zip(moment, kept, strict=True)) for moment in counts)


@cache
def live_counts(
    kind: ScheduleKind, pp: int, pp_rank: int, num_microbatches: int, chunks: int, needs_backward: tuple[bool, ...]
) -> frozenset[tuple[int, ...]]:
    """Micro-batches between forward and backward, by chunk, at every moment of a rank's schedule."""
    live, moments = [0] * chunks, {(0,) * chunks}
    for action in build_schedule(kind, pp, pp_rank, num_microbatches, chunks, needs_backward):
        if needs_backward[action.chunk * pp + pp_rank]:
            live[action.chunk] += 1 if action.kind == "forward" else -1
            moments.add(tuple(live))
    return frozenset(moments)


def _gathered(config: RunConfig, parts: Parts, trainable: int, dp: int) -> float:
    """Elements of the largest bucket, whole and this rank's share, while parameters are gathered over dp."""
    if dp == 1 or not trainable:
        return 0.0
    bucket = min(trainable, max(parts.largest, config.parallel.bucket_mb * 1e6 / GRADIENT_BYTES))
    return bucket * (1 + 1 / dp)
