"""The rank grid: four axes, one object, passed to whoever needs it.

Ranks are laid out as a (pp, dp, ep, tp) grid with tp fastest, so tensor-parallel neighbours sit on one node:

- tp  tensor parallel: every linear is split over it.
- ep  expert parallel: BTS members side by side on the same micro-batch; MoE experts over different tokens.
- dp  data parallel: replicas on different samples.
- pp  pipeline parallel: stages of consecutive layers.

A MoE model sees the grid as `ParallelMesh.routed` shows it: its ep ranks take different samples, so they are places on
dp, which is (dp, ep) together there; `experts` and `replicas` are the two parts that dp is made of.

An `Axis` is one rank's view of one axis: its size, this rank's place on it and the process group of the ranks that
differ only there. At degree 1 the group is None and collectives return early: it is the same code.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist

from megabts.config.run import ParallelConfig
from megabts.errors import UsageError
from megabts.runtime.device import collective_timeout

AXES = ("pp", "dp", "ep", "tp")


@dataclass(frozen=True)
class Axis:
    """One rank's place on one mesh axis."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    """World ranks of the axis's places, in order."""


@dataclass(frozen=True)
class ParallelMesh:
    """This rank's four axes, and for a MoE model the parts of dp."""

    pp: Axis = Axis("pp")
    dp: Axis = Axis("dp")
    ep: Axis = Axis("ep")
    tp: Axis = Axis("tp")
    data: Axis = Axis("dp")
    """dp and ep as one axis, ep faster."""
    experts: Axis = Axis("experts")
    """Ranks of dp that divide a layer's ffn experts among them, and send each other tokens."""
    replicas: Axis = Axis("replicas")
    """Ranks of dp that hold the same ffn experts."""

    @property
    def routed(self) -> "ParallelMesh":
        """The same grid for a MoE model: (pp, dp x ep, 1, tp), with ep as `experts` and dp as `replicas`."""
        parts = {"experts": replace(self.ep, name="experts"), "replicas": replace(self.dp, name="replicas")}
        return replace(self, dp=self.data, ep=Axis("ep"), **parts)

    @property
    def world_size(self) -> int:
        """Number of ranks in the grid."""
        return prod(getattr(self, name).size for name in AXES)

    @property
    def world(self) -> Axis:
        """All ranks, as one axis (of the default group)."""
        return Axis("world", self.world_size, self.rank, None, tuple(range(self.world_size)))

    @property
    def rank(self) -> int:
        """This rank's number in the grid."""
        number = 0
        for name in AXES:
            axis: Axis = getattr(self, name)
            number = number * axis.size + axis.rank
        return number

    def axis(self, name: str) -> Axis:
        """The axis called `name` (pp, dp, ep or tp)."""
        axis: Axis = getattr(self, name)
        return axis


def degrees(config: ParallelConfig, world_size: int) -> tuple[int, int, int, int]:
    """Sizes of (pp, dp, ep, tp); dp takes the ranks that the others leave.

    Raises UsageError, with the arithmetic, when they do not multiply to `world_size`.
    """
    model = config.pipeline * config.expert * config.tensor
    if world_size % model:
        raise UsageError(
            f"parallel.pipeline {config.pipeline} x parallel.expert {config.expert} x parallel.tensor {config.tensor} "
            f"= {model} does not divide the {world_size} ranks; start a multiple of {model} ranks"
        )
    return config.pipeline, world_size // model, config.expert, config.tensor


def build_mesh(config: ParallelConfig, world_size: int, rank: int) -> ParallelMesh:
    """The mesh of this rank; every rank must call it (process groups are created in the same order everywhere).

    `torch.distributed` must be initialised when world_size > 1.
    """
    sizes = degrees(config, world_size)
    grid = torch.arange(world_size).view(sizes)
    timeout = collective_timeout(config.timeout)
    axes = {name: _axis(name, grid.movedim(dim, -1), rank, timeout) for dim, name in enumerate(AXES)}
    dp, ep = axes["dp"], axes["ep"]
    if min(dp.size, ep.size) > 1:
        data = _axis("dp", grid.permute(0, 3, 1, 2).flatten(2), rank, timeout)
    else:
        data = replace(ep if ep.size > 1 else dp, name="dp")
    return ParallelMesh(**axes, data=data)


def _axis(name: str, lines: torch.Tensor, rank: int, timeout: timedelta) -> Axis:
    """This rank's place on the axis whose places `lines` numbers in its last dimension."""
    found = Axis(name)
    for line in lines.flatten(0, -2).tolist():
        group = dist.new_group(line, timeout=timeout) if len(line) > 1 else None
        if rank in line:
            found = Axis(name, len(line), line.index(rank), group, tuple(line))
    return found
