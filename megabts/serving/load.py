"""From a folder to what is served, on every rank that holds a part of the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megabts.build import load_model, open_model
from megabts.config.run import ParallelConfig
from megabts.errors import UsageError, UserError
from megabts.inference.ranks import check_mesh
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.runtime.device import DTYPES, Launch, pick_device, share_cores, start_communication
from megabts.runtime.rendezvous import Meeting, meet
from megabts.serving.served import Limits, Served
from megabts.tokenizers.build import build_tokenizer

TOKENS_A_ROW = 2048
"""Of the caches, for each of the rows, where no number is given and the model may read more."""


@dataclass(frozen=True)
class Place:
    """Where this rank stands."""

    mesh: ParallelMesh
    parallel: ParallelConfig
    device: torch.device
    meeting: Meeting | None
    """Of several ranks."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that serves."""
        return self.mesh.rank == 0


def join(tensor: int, expert: int) -> Place:
    """Meet the other ranks. Raises UsageError where there are not tensor x expert of them."""
    launch = Launch.from_environment()
    if tensor * expert != launch.world_size:
        raise UsageError(
            f"--parallel.tensor {tensor} x --parallel.expert {expert} = {tensor * expert} ranks hold the model and "
            f"there are {launch.world_size}; start {tensor * expert} with torchrun"
        )
    share_cores(launch)
    parallel, device = ParallelConfig(tensor=tensor, expert=expert), pick_device(launch)
    meeting = meet(launch, parallel.timeout) if launch.world_size > 1 else None
    start_communication(launch, device, parallel.backend, parallel.timeout, meeting.store if meeting else None)
    return Place(build_mesh(parallel, launch.world_size, launch.rank), parallel, device, meeting)


@dataclass(frozen=True)
class Source:
    """What to serve, and how it is called."""

    checkpoint: Path
    name: str = ""
    """"": the folder's, or that of the run it is a checkpoint of."""
    tokenizer: str = ""
    """Path, bytes or null:VOCAB; "": the checkpoint's own."""
    special_tokens: bool = False
    """Whether a tokenizer.json's template adds its tokens to prompts."""
    dtype: str | None = None
    without: Sequence[str] = ()
    """Experts left out for all requests."""


def load_served(
    source: Source,
    place: Place,
    *,
    max_rows: int = 16,
    max_tokens: int | None = None,
    queue: int = 64,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
) -> tuple[Served, ParallelMesh]:
    """This rank's part of the model, ready to serve, and the mesh it is served on. Raises UserError, UsageError."""
    stored = open_model(source.checkpoint)
    mesh = place.mesh.routed if stored.config.method == "moe" else place.mesh
    check_mesh(mesh)
    parallel = replace(place.parallel, exchange=stored.config.parallel.exchange)
    stored = replace(stored, config=replace(stored.config, parallel=parallel))
    dtype = DTYPES[source.dtype] if source.dtype else None
    loaded = load_model(stored, mesh, dtype, place.device, without=source.without)
    loaded.model.train(False)
    spec = source.tokenizer or loaded.tokenizer
    if not spec:
        raise UserError(f"{source.checkpoint} has no tokenizer; give --tokenizer")
    tokenizer, longest = build_tokenizer(spec), loaded.model.config.max_seq_len
    if tokenizer.vocab_size > loaded.model.config.vocab_size:
        raise UserError(
            f"tokenizer {spec} has {tokenizer.vocab_size} ids and the model a vocabulary of "
            f"{loaded.model.config.vocab_size}; give the tokenizer that the model was trained with"
        )
    room = max_tokens or max(longest, max_rows * min(longest, TOKENS_A_ROW))
    most = min(longest, room) - 1
    limits = Limits(max_rows, room, queue, min(max_prompt_tokens or most, most), min(max_new_tokens or most, most))
    if most < 1:
        raise UsageError(f"--max-tokens is {room}; a prompt and a completion need 2 at least")
    return Served(
        loaded.model,
        loaded.config.method,
        source.name or _name(source.checkpoint),
        tokenizer,
        build_tokenizer(spec, include_special_tokens=True) if source.special_tokens else tokenizer,
        limits,
        alone=mesh.world_size == 1,
    ), mesh


def _name(folder: Path) -> str:
    """A folder's name; a checkpoint's is its run's."""
    whole = folder.resolve()
    return whole.parent.name if whole.name.startswith("step_") else whole.name
