"""How long a step of a layout takes, where that time goes, and what its links carry.

A part's time is its operations at the peak's usual share, the bytes that its element-wise work moves at the memory's,
and its tensor- and expert-parallel messages at their link's, one after the other: nothing of these is taken to overlap.
Stages then run in the pipeline's real schedule (`parallel.balance.simulate`), of which a few rounds stand for all.
After it come what the reduction of gradients could not hide behind the last micro-batch's backward, the optimizer, and
the all-gather of parameters.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megabts.config.run import RunConfig
from megabts.parallel.balance import Cost, simulate, stages_with_backward
from megabts.parallel.schedules import build_schedule
from megabts.planner.gpus import MATMUL_SHARE, MEMORY_SHARE, Cluster
from megabts.planner.work import Work, rows, value_bytes

ACCUMULATE_BYTES = 8
"""Moved per trainable parameter and micro-batch, besides the gradient itself: the fp32 buffer read and written."""
STEP_BYTES = 32
"""Moved per parameter that the optimizer steps: masters and moments read and written, gradient zeroed and read."""


@dataclass(frozen=True)
class Shares:
    """Seconds of a step, averaged over the pipeline's ranks; they add up to the step."""

    compute: float
    memory: float
    """Element-wise work, gradient accumulation and the optimizer, at the memory's bandwidth."""
    tp: float
    ep: float
    dp: float
    """Not hidden behind backward."""
    bubble: float
    """Waiting for other stages."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank sends in a step, by mesh axis; ep: sends or, at a gather to the hub, receives."""

    tp: float
    ep: float
    dp: float
    pp: float


@dataclass(frozen=True)
class StepTime:
    """One predicted step."""

    seconds: float
    bubble: float
    """Share of the pipeline's time in which ranks wait."""
    shares: Shares
    traffic: Traffic

    @property
    def slowest(self) -> str:
        """What takes most of the time."""
        return max(asdict(self.shares).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class _Stage:
    """Seconds of one micro-batch in one virtual stage, by kind: (forward, backward) each."""

    compute: tuple[float, float]
    memory: tuple[float, float]
    tp: tuple[float, float]
    ep: tuple[float, float]

    def seconds(self, way: int) -> float:
        return self.compute[way] + self.memory[way] + self.tp[way] + self.ep[way]


@dataclass(frozen=True)
class Timed:
    """A layout's stages, timed; `bound` is a step without bubble: never more than `step` gives."""

    config: RunConfig
    cluster: Cluster
    stages: tuple[_Stage, ...]
    needs_backward: tuple[bool, ...]
    num_microbatches: int
    message: float
    """Bytes of a message between stages."""
    after: tuple[float, float]
    """Seconds after the pipeline: (dp, memory)."""
    traffic: Traffic

    @property
    def bound(self) -> float:
        """Seconds that the busiest rank works, and what comes after."""
        return self.num_microbatches * self._busiest + sum(self.after)

    @property
    def _busiest(self) -> float:
        """Seconds that the busiest rank works on one micro-batch."""
        pp = self.config.parallel.pipeline
        work = [stage.seconds(0) + stage.seconds(1) for stage in self.stages]
        return max(sum(work[rank::pp]) for rank in range(pp))

    def step(self) -> StepTime:
        """Run the schedule on paper."""
        pp, m = self.config.parallel.pipeline, self.num_microbatches
        forward, backward = ([stage.seconds(way) for stage in self.stages] for way in (0, 1))
        few = min(m, 3 * pp)
        seconds = self._simulated(few, forward, backward)
        if few < m:  # the schedule repeats itself every pp micro-batches
            seconds += (m - few) * max((seconds - self._simulated(few - pp, forward, backward)) / pp, self._busiest)
        step = seconds + sum(self.after)
        mean = {
            kind: m / pp * sum(sum(getattr(stage, kind)) for stage in self.stages)
            for kind in ("compute", "memory", "tp", "ep")
        }
        waiting = max(0.0, seconds - sum(mean.values()))  # rounding
        mean["memory"] += self.after[1]
        return StepTime(step, waiting / seconds, Shares(**mean, dp=self.after[0], bubble=waiting), self.traffic)

    def _simulated(self, num_microbatches: int, forward: list[float], backward: list[float]) -> float:
        parallel = self.config.parallel
        pp, chunks = parallel.pipeline, parallel.chunks
        lists = [
            build_schedule(parallel.schedule, pp, rank, num_microbatches, chunks, self.needs_backward)
            for rank in range(pp)
        ]
        transfer = self.message / self.cluster.bandwidth(self.cluster.num_gpus) if pp > 1 else 0.0
        return simulate(lists, self.needs_backward, forward, backward, transfer).seconds


def timed(
    config: RunConfig,
    cluster: Cluster,
    stages: Sequence[Sequence[Work]],
    costs: Sequence[Cost],
    message: float,
    num_microbatches: int,
    dp: int,
    *,
    shared_dp: int = 1,
) -> Timed:
    """A layout's stages, timed on the busiest expert-parallel rank of each.

    `stages`: by expert-parallel rank, then stage; `costs`: operations per token by stage, over all of tp; `message`:
    most bytes that a rank sends to the next stage. `shared_dp`: expert-parallel ranks over which gradients of what is
    not `Work.spread` are summed too, where these have samples of their own.
    """
    parallel, value = config.parallel, value_bytes(config)
    pp, needs = parallel.pipeline, stages_with_backward(costs)
    by_stage = list(zip(*stages, strict=True))
    seconds = tuple(_stage(config, cluster, cost, works) for cost, works in zip(costs, by_stage, strict=True))
    ranks = [sum(works[rank::pp], Work()) for works in stages for rank in range(pp)]
    group = dp * shared_dp
    summed = max((rank.trainable - rank.spread) * (group - 1) / group + rank.spread * (dp - 1) / dp for rank in ranks)
    stepped = max((rank.trainable - rank.spread) / group + rank.spread / dp for rank in ranks)
    reduced, gathered = summed * 4, summed * value
    link = cluster.bandwidth(parallel.tensor * parallel.expert * dp)
    hidden = min((stage.seconds(1) for stage, need in zip(seconds, needs, strict=True) if need), default=0.0)
    exposed = max(0.0, reduced / link - hidden) + gathered / link
    steps = stepped * STEP_BYTES / (cluster.gpu.memory_bandwidth * MEMORY_SHARE)
    sends = [[(k + 1 < len(needs)) + (k > 0 and needs[k - 1]) for k in range(r, len(needs), pp)] for r in range(pp)]
    messages = num_microbatches * max(map(sum, sends))
    traffic = Traffic(
        tp=num_microbatches * max(sum(rank.tensor) for rank in ranks),
        ep=num_microbatches * max(sum(rank.expert) for rank in ranks),
        dp=reduced + gathered,
        pp=messages * message,
    )
    return Timed(config, cluster, seconds, needs, num_microbatches, message, (exposed, steps), traffic)


def _stage(config: RunConfig, cluster: Cluster, cost: Cost, works: Sequence[Work]) -> _Stage:
    parallel, gpu = config.parallel, cluster.gpu
    rate = gpu.peak(value_bytes(config)) * MATMUL_SHARE
    tokens = rows(config) / parallel.tensor
    memory = gpu.memory_bandwidth * MEMORY_SHARE
    tp, ep = cluster.bandwidth(parallel.tensor), cluster.bandwidth(parallel.tensor * parallel.expert)
    again = max(work.again for work in works)
    accumulated = max(work.trainable for work in works) * ACCUMULATE_BYTES
    moved = [max(work.moved[way] for work in works) for way in (0, 1)]
    return _Stage(
        compute=(cost.forward * tokens / rate, (cost.backward * tokens + again) / rate),
        memory=(moved[0] / memory, (moved[1] + accumulated) / memory),
        tp=_both(tuple(max(work.tensor[way] for work in works) / tp for way in (0, 1))),
        ep=_both(tuple(max(work.expert[way] for work in works) / ep for way in (0, 1))),
    )


def _both(pair: tuple[float, ...]) -> tuple[float, float]:
    forward, backward = pair
    return forward, backward
