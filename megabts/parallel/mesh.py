"""The rank grid: four axes, one object, passed to whoever needs it.

Ranks are laid out as a (pp, dp, ep, tp) grid with tp fastest, so tensor-parallel neighbours sit on one node:

- tp  tensor parallel: every linear is split over it.
- ep  expert parallel: BTS members side by side on the same micro-batch; MoE experts over different tokens.
- dp  data parallel: replicas on different samples.
- pp  pipeline parallel: stages of consecutive layers.

An `Axis` is one rank's view of one axis: its size, this rank's place on it and the process group of the ranks that
differ only there. At degree 1 the group is None and collectives return early: it is the same code.
"""

from dataclasses import dataclass
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
    """This rank's four axes."""

    pp: Axis = Axis("pp")
    dp: Axis = Axis("dp")
    ep: Axis = Axis("ep")
    tp: Axis = Axis("tp")

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
    axes = {}
    for dim, name in enumerate(AXES):
        lines = grid.movedim(dim, -1).reshape(-1, sizes[dim]).tolist()
        for line in lines:
            group = dist.new_group(line, timeout=collective_timeout(config.timeout)) if sizes[dim] > 1 else None
            if rank in line:
                axes[name] = Axis(name, sizes[dim], line.index(rank), group, tuple(line))
    return ParallelMesh(**axes)
