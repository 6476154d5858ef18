"""Saves as one process makes them, from full tensors, waited for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megabts.checkpoint.manifest import CheckpointError, MemberRecord
from megabts.checkpoint.pieces import Piece
from megabts.checkpoint.saver import Saver
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta


def full_piece(name: str, tensor: Tensor) -> Piece:
    """A tensor that one rank holds whole."""
    return Piece(name, ParamMeta(tuple(tensor.shape)), Axis("tp"), tensor)


def save_step(
    run_dir: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    blobs: Mapping[str, bytes],
    state: Mapping[str, Any],
    members: Sequence[MemberRecord] = (),
    *,
    keep_last: int | None = None,
    asynchronous: bool = False,
) -> Path:
    """The folder that was saved. Raises CheckpointError when it was not."""
    saver = Saver(run_dir, keep_last=keep_last, asynchronous=asynchronous)
    pieces = {file: [full_piece(*item) for item in tensors.items()] for file, tensors in files.items()}
    saver.start(step, pieces, blobs, state, members)
    saved = saver.wait()
    assert saved is not None
    assert not saver.in_flight
    if saved.problem:
        raise CheckpointError(saved.problem)
    return saved.folder
