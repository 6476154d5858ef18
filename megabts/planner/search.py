"""All layouts of a run on a cluster, the ones that fit, and the fastest of these.

Looked at are tensor degrees inside a node, pipelines up to embedding + layers + head, chunks of interleaved schedules,
expert-parallel degrees up to the members (of a MoE model those that divide its ffn experts), both exchanges, every
recomputation and micro-batches in powers of two; the global batch and the sequence length stay as configured. Every
layout passes `parallel.layout.check_layout`.

First all memory is counted, then the layouts that fit are timed in the order of a bound that no schedule can beat, up
to where the bound is above what is found already: the ranking is exact. Pipelines are cut by `balance.balanced_cuts`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from megabts.config.run import ParallelConfig, RunConfig
from megabts.errors import UsageError
from megabts.model.backend import Recompute
from megabts.parallel.balance import Cost, balanced_cuts, stages_with_backward
from megabts.parallel.layout import check_layout
from megabts.parallel.schedules import ScheduleKind
from megabts.planner.gpus import Cluster
from megabts.planner.memory import Memory, fullest_rank
from megabts.planner.methods import METHODS, Method
from megabts.planner.step_time import StepTime, Timed, timed
from megabts.planner.work import Parts, Work, state_bytes, value_bytes

CHUNKS = (1, 2, 4)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
CHOSEN = frozenset(
    {f"parallel.{name}" for name in ("tensor", "sequence", "pipeline", "chunks", "expert", "exchange")}
    | {"train.micro_batch", "train.recompute"}
)
"""Settings that the planner tries, unless they are pinned."""

Mesh = tuple[int, int, int]
"""Degrees of tensor, pipeline and expert parallelism."""


@dataclass(frozen=True)
class Layout:
    """One layout with its memory, and what its time is computed from."""

    config: RunConfig
    dp: int
    num_microbatches: int
    memory: Memory
    timed: Callable[[], Timed]

    @property
    def mesh(self) -> Mesh:
        """(tp, pp, ep)."""
        parallel = self.config.parallel
        return parallel.tensor, parallel.pipeline, parallel.expert


@dataclass(frozen=True)
class Plan:
    """What the search found."""

    cluster: Cluster
    pinned: frozenset[str]
    num_layouts: int
    num_fitting: int
    best: tuple[tuple[Layout, StepTime], ...]
    """The fastest of each mesh, fastest first; all fit."""
    closest: Layout | None
    """The one with the least memory; None where the run has no layout at all on so many GPUs."""


def plan(config: RunConfig, cluster: Cluster, *, top: int, pinned: frozenset[str] = frozenset()) -> Plan:
    """The fastest layout of each of the `top` fastest meshes.

    `pinned`: keys (`parallel.tensor`) that keep the configuration's value. Raises UsageError for what is not planned
    for, and for pinned settings that leave no layout at all.
    """
    check_plannable(config, pinned)
    layouts = list(every_layout(config, cluster, METHODS[config.method], pinned))
    if not layouts:
        _check_pinned(config, cluster, pinned)
    fitting = [(x.timed(), x) for x in layouts if x.memory.total <= cluster.gpu.memory]
    best: dict[Mesh, tuple[Layout, StepTime]] = {}
    for steps, layout in sorted(fitting, key=lambda item: item[0].bound):
        seconds = sorted(step.seconds for _, step in best.values())
        if len(seconds) >= top and steps.bound > seconds[top - 1]:
            break
        if layout.mesh not in best or steps.bound < best[layout.mesh][1].seconds:
            found = (layout, steps.step())
            best[layout.mesh] = min(found, best.get(layout.mesh, found), key=lambda item: item[1].seconds)
    ranked = sorted(best.values(), key=lambda item: item[1].seconds)[:top]
    closest = min(layouts, key=lambda layout: layout.memory.total, default=None)
    return Plan(cluster, pinned, len(layouts), len(fitting), tuple(ranked), closest)


def smallest_cluster(config: RunConfig, cluster: Cluster, pinned: frozenset[str]) -> int | None:
    """The least doubling of the GPUs, to 16 times as many, on which some layout fits; None if none does."""
    for factor in (2, 4, 8, 16):
        more = replace(cluster, num_gpus=factor * cluster.num_gpus)
        layouts = every_layout(config, more, METHODS[config.method], pinned)
        if any(layout.memory.total <= cluster.gpu.memory for layout in layouts):
            return more.num_gpus
    return None


def check_plannable(config: RunConfig, pinned: frozenset[str]) -> None:
    """Raises UsageError for a run that cannot be planned, whatever the cluster."""
    value_bytes(config)
    if config.method not in METHODS:
        raise UsageError(f"method {config.method} has one layout, replicas; planned are {', '.join(METHODS)}")
    chosen = sorted(key for key in pinned if key in ("parallel.cuts", "parallel.schedule"))
    if chosen:
        raise UsageError(f"{chosen[0]} is for the planner to choose; leave it out")
    if config.method == "bts" and not config.bts.experts:
        raise UsageError("method bts needs a bts.experts.NAME at least; its folder need not exist to plan")
    if config.method == "moe":
        if not config.moe.members:
            raise UsageError("method moe needs a moe.members.NAME at least; its folder need not exist to plan")
        config.moe.ffn_width(config.model.ffn_size)


def _check_pinned(config: RunConfig, cluster: Cluster, pinned: frozenset[str]) -> None:
    """Raises UsageError, naming the flags that leave no layout, if there are some without them."""
    flags = sorted(pinned & CHOSEN)
    for released in [*({flag} for flag in flags), set(flags)]:
        layouts = list(every_layout(config, cluster, METHODS[config.method], pinned - released))
        if not layouts:
            continue
        given = " ".join(f"--{key} {str(_setting(config, key)).lower()}" for key in sorted(released))
        words = "leave some out"
        if len(released) == 1:
            fitting = {_setting(found.config, key) for found in layouts for key in released}
            words = f"it may be {', '.join(str(value).lower() for value in sorted(fitting))}"
        raise UsageError(f"no layout on {cluster.num_gpus} GPUs passes the run's checks with {given}; {words}")


def every_layout(
    config: RunConfig, cluster: Cluster, method: Method, pinned: frozenset[str] = frozenset()
) -> Iterator[Layout]:
    """Every layout of the run, fitting or not, but more recomputation only of what does not fit with less."""
    cuts: dict[tuple[object, ...], list[int]] = {}
    for chosen in _settings(config, cluster, method, pinned):
        waiting = list(_pipelines(config, chosen, cluster, method, pinned))
        for recompute in _values(config, "train.recompute", RECOMPUTE, pinned):
            layouts = list(_with_recompute(chosen, cluster, method, waiting, recompute, cuts)) if waiting else []
            yield from layouts
            fits = [layout.memory.total <= cluster.gpu.memory for layout in layouts]
            waiting = [item for item, enough in zip(waiting, fits) if not enough]


def _with_recompute(
    chosen: RunConfig,
    cluster: Cluster,
    method: Method,
    pipelines: Sequence[tuple[ParallelConfig, int]],
    recompute: Recompute,
    cuts: dict[tuple[object, ...], list[int]],
) -> Iterator[Layout]:
    """The layouts that differ in the pipeline alone; `cuts` are those found so far."""
    chosen = replace(chosen, train=replace(chosen.train, recompute=recompute))
    expert, exchange = chosen.parallel.expert, chosen.parallel.exchange
    ranks = [method.parts(chosen, ep_rank) for ep_rank in range(expert)]
    costs, state = method.costs(chosen), state_bytes(chosen)
    staged: dict[int, _Staged] = {}
    for parallel, dp in pipelines:
        num_stages = parallel.num_stages
        if num_stages not in staged:
            key = (num_stages, expert, exchange, recompute == "full")
            if key not in cuts:
                cuts[key] = balanced_cuts(costs, num_stages)
            works = [parts.stages(cuts[key], state) for parts in ranks]
            staged[num_stages] = _Staged(tuple(cuts[key]), costs.of_stages(cuts[key]), works)
        parallel = replace(parallel, cuts=list(staged[num_stages].cuts))
        yield _layout(replace(chosen, parallel=parallel), cluster, method, ranks, staged[num_stages], dp)


@dataclass(frozen=True)
class _Staged:
    """A model cut into stages: operations per token of each, and by expert-parallel rank what it has."""

    cuts: tuple[int, ...]
    costs: list[Cost]
    works: list[tuple[Work, ...]]


def _layout(
    config: RunConfig, cluster: Cluster, method: Method, ranks: Sequence[Parts], staged: _Staged, dp: int
) -> Layout:
    shared = config.parallel.expert if method.splits_samples else 1
    count = config.train.global_batch // (config.train.micro_batch * dp * shared)
    memory = fullest_rank(config, ranks, staged.works, stages_with_backward(staged.costs), count, dp, shared)
    message = max(parts.states for parts in ranks) * state_bytes(config)
    price = partial(timed, config, cluster, staged.works, staged.costs, message, count, dp, shared_dp=shared)
    return Layout(config, dp, count, memory, price)


def _settings(config: RunConfig, cluster: Cluster, method: Method, pinned: frozenset[str]) -> Iterator[RunConfig]:
    """Everything but pipeline and recomputation."""
    members = {"bts": len(config.bts.members), "moe": config.moe.num_ffn_experts}.get(config.method, 1)
    axes: dict[str, Sequence[Any]] = {
        "parallel.tensor": [tp for tp in range(1, cluster.per_node + 1) if cluster.per_node % tp == 0],
        "parallel.sequence": (False, True),
        "parallel.expert": range(1, members + 1),
        "parallel.exchange": ("gather", "reduce"),
        "train.micro_batch": MICRO_BATCHES,
    }
    values = [_values(config, key, choices, pinned) for key, choices in axes.items()]
    for tp, sequence, ep, exchange, micro_batch in product(*values):
        alone = sequence and tp == 1
        same = exchange == "reduce" and (ep == 1 or method.splits_samples) and "parallel.exchange" not in pinned
        if alone or same or cluster.num_gpus % (tp * ep) or (method.splits_samples and members % ep):
            continue
        parallel = replace(
            config.parallel, tensor=tp, sequence=sequence, expert=ep, exchange=exchange, pipeline=1, chunks=1, cuts=[]
        )
        yield replace(config, parallel=parallel, train=replace(config.train, micro_batch=micro_batch))


def _pipelines(
    config: RunConfig, chosen: RunConfig, cluster: Cluster, method: Method, pinned: frozenset[str]
) -> Iterator[tuple[ParallelConfig, int]]:
    """Every pipeline that the layout's checks let pass, and the data-parallel degree it leaves."""
    given, inner = chosen.parallel, chosen.parallel.tensor * chosen.parallel.expert
    degrees = _values(config, "parallel.pipeline", range(1, chosen.model.num_layers + 3), pinned)
    for pp, chunks in product(degrees, _values(config, "parallel.chunks", CHUNKS, pinned)):
        dp = cluster.num_gpus // (inner * pp)
        split = dp * given.expert if method.splits_samples else dp
        schedule: ScheduleKind = "interleaved" if chunks > 1 else "1f1b"
        count, rest = divmod(chosen.train.global_batch, max(1, chosen.train.micro_batch * split))
        if cluster.num_gpus % (inner * pp) or rest or (chunks > 1 and count % pp):
            continue
        try:
            parallel = replace(given, pipeline=pp, schedule=schedule, chunks=chunks)
            check_layout(replace(chosen, parallel=parallel), cluster.num_gpus)
        except UsageError:
            continue
        yield parallel, dp


def _values(config: RunConfig, key: str, choices: Sequence[Any], pinned: frozenset[str]) -> Sequence[Any]:
    """What to try for a setting: the configuration's value alone where it is pinned."""
    return (_setting(config, key),) if key in pinned else choices


def _setting(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
