"""From the command line of one or many processes to a model that they hold together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megabts.build import LoadedModel, StoredModel, load_model, open_model
from megabts.config.run import ParallelConfig
from megabts.errors import UsageError
from megabts.inference.ranks import check_mesh
from megabts.parallel.collectives import broadcast_object
from megabts.parallel.layout import check_generation
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.runtime.device import Launch, pick_device, share_cores, start_communication
from megabts.runtime.rendezvous import Meeting, meet


@dataclass(frozen=True)
class Place:
    """Where this rank stands."""

    mesh: ParallelMesh
    parallel: ParallelConfig
    device: torch.device
    meeting: Meeting | None
    """Of several ranks."""


def join(parallel: ParallelConfig) -> Place:
    """Meet the other ranks. Raises UsageError where there are not as many as hold the model."""
    launch = Launch.from_environment()
    needed = parallel.tensor * parallel.expert
    if needed != launch.world_size:
        raise UsageError(
            f"--parallel.tensor {parallel.tensor} x --parallel.expert {parallel.expert} = {needed} ranks hold the "
            f"model and there are {launch.world_size}; start {needed} with torchrun"
        )
    share_cores(launch)
    device, timeout = pick_device(launch), parallel.timeout
    meeting = meet(launch, timeout) if launch.world_size > 1 else None
    start_communication(launch, device, parallel.backend, timeout, meeting.store if meeting else None)
    return Place(build_mesh(parallel, launch.world_size, launch.rank), parallel, device, meeting)


def load_part(
    checkpoint: Path, place: Place, dtype: torch.dtype | None = None, without: Sequence[str] = ()
) -> tuple[LoadedModel, ParallelMesh]:
    """This rank's part of a model, and the mesh it is to generate on; the first rank alone verifies the folder.

    Raises UserError (see `load_model`), UsageError for degrees that do not fit the model.
    """
    stored: StoredModel = broadcast_object(open_model(checkpoint) if place.mesh.rank == 0 else None)
    parallel = replace(place.parallel, exchange=stored.config.parallel.exchange)
    stored = replace(stored, config=replace(stored.config, parallel=parallel))
    check_generation(stored.config)
    mesh = place.mesh.routed if stored.config.method == "moe" else place.mesh
    check_mesh(mesh)
    return load_model(stored, mesh, dtype, place.device, without=without), mesh
