"""Saves to test with: of one process from full tensors, and of several ranks that one process plays."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.checkpoint import saver as saver_module
from megabts.checkpoint.manifest import CheckpointError, MemberRecord, verify
from megabts.checkpoint.pieces import Piece
from megabts.checkpoint.reader import load_tensors
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


class PlayedRanks:
    """Ranks as threads of one process, which meet at a barrier instead of in collectives."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=60)
        self.values: list[Any] = [None] * num_ranks
        self.me = threading.local()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` of every rank, side by side. Raises what the first of them raised."""
        with ThreadPoolExecutor(self.num_ranks) as pool, pytest.MonkeyPatch.context() as patch:
            patch.setattr(saver_module, "gather_objects", self._gather)
            patch.setattr(saver_module, "broadcast_object", lambda value: self._gather(value)[0])
            return [job.result() for job in [pool.submit(self._run, work, rank) for rank in range(self.num_ranks)]]

    def _run(self, work: Callable[[int], Any], rank: int) -> Any:
        self.me.rank = rank
        try:
            return work(rank)
        except BaseException:
            self.barrier.abort()
            raise

    def _gather(self, value: Any) -> list[Any]:
        self.values[self.me.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


def shares(rank: int, num_ranks: int, step: int, size: int = 64) -> dict[str, list[Piece]]:
    """What one of several tensor-parallel ranks holds: half a matrix, a norm that all hold, and their state."""
    tp = Axis("tp", num_ranks, rank)
    matrix, norm = ParamMeta((size, 2), dim=0), ParamMeta((3,))
    pieces = {}
    for file, sign in (("model.safetensors", 1), ("optimizer.safetensors", -1)):
        rows = torch.arange(2.0 * size).view(size, 2) + 1000 * sign * step
        whole = torch.full((3,), float(sign * step))
        pieces[file] = [Piece("w", matrix, tp, matrix.shard(rows, tp).clone()), Piece("h", norm, tp, whole)]
    return pieces


def assert_shares(folder: Path, step: int, size: int = 64) -> None:
    """The folder holds exactly what `shares` gave for this step."""
    verify(folder)
    for file, sign in (("model.safetensors", 1), ("optimizer.safetensors", -1)):
        found = load_tensors(folder, file)
        assert found.keys() == {"w", "h"}
        assert torch.equal(found["w"], torch.arange(2.0 * size).view(size, 2) + 1000 * sign * step)
        assert found["h"].tolist() == [sign * step] * 3
