"""Saving a run's steps from all its ranks, beside the training.

A save goes through two phases, each beside the training: every rank writes its own files into the hidden folder of the
step; then the first rank adds the manifest, gives the folder its name, reads it back and deletes old steps. Between
phases the ranks must agree that all are done: the caller asks each rank `busy` at every step (one number in a reduction
that it has anyway) and calls `advance` on all ranks once none is. A crash at any point leaves the step before or this
one.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabts.checkpoint.durable import FileRecord, beside, sync_folder
from megabts.checkpoint.folder import TensorFiles, abandon_folder, space_needed, write_files
from megabts.checkpoint.manifest import MemberRecord
from megabts.checkpoint.pieces import Piece, Plan, fragments_of, make_plan, offer, tables_to_json
from megabts.checkpoint.storage import begin_step, publish_step, step_name
from megabts.errors import UserError
from megabts.parallel.collectives import broadcast_object, gather_objects
from megabts.runtime.device import synchronize

MAX_PAUSE = 0.1
"""Seconds between two looks at a save that is waited for."""


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on every rank."""

    step: int
    folder: Path
    problem: str
    """Why there is no such checkpoint; empty when there is."""


class _Job:
    """Work in a thread of its own. Dies with the process: a save that nobody waits for ends like one that is killed."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error

    def outcome(self) -> tuple[Any, str]:
        """(result, problem) when the work is done; errors that are not the user's are raised here."""
        self.thread.join()
        if self.error is not None and not isinstance(self.error, UserError):
            raise self.error
        return self.result, str(self.error) if self.error else ""


@dataclass
class _Flight:
    """The save under way."""

    step: int
    folder: Path
    state: Mapping[str, Any]
    members: Sequence[MemberRecord]
    problem: str
    """The first rank's, before anything was written."""
    job: _Job | None = None
    publishing: bool = False


@dataclass
class _Snapshot:
    """Copies of tensors in main memory, in buffers that are kept from save to save."""

    buffers: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def take(self, files: TensorFiles) -> dict[str, dict[str, Tensor]]:
        """The same files with copies; pinned ones for tensors of a GPU, which it then writes at full speed."""
        copies: dict[str, dict[str, Tensor]] = {}
        devices = set()
        for file, tensors in files.items():
            for key, tensor in tensors.items():
                buffer = self.buffers.get((file, key))
                if buffer is None:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                    self.buffers[file, key] = buffer
                buffer.copy_(tensor.detach(), non_blocking=True)
                copies.setdefault(file, {})[key] = buffer
                devices.add(tensor.device)
        for device in devices:
            synchronize(device)
        return copies


class Saver:
    """Every rank of a run has one; at most one save is under way.

    `keep_last`: steps kept (None: all). `asynchronous`: tensors are copied when a save starts, so that they may change
    while it is written; otherwise the caller must `wait`.
    """

    def __init__(
        self, run_dir: Path, rank: int = 0, *, keep_last: int | None = None, asynchronous: bool = False
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise UserError(f"keep_last is {keep_last}; keep at least 1 step, or all (none)")
        self.run_dir = Path(run_dir)
        self.rank = rank
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._snapshot = _Snapshot()
        self._plan: Plan | None = None
        self._table_bytes = 0
        self._flight: _Flight | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._flight is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still works on it."""
        return self._flight is not None and self._flight.job is not None and self._flight.job.thread.is_alive()

    def start(
        self,
        step: int,
        pieces: Mapping[str, Sequence[Piece]],
        blobs: Mapping[str, bytes],
        state: Mapping[str, Any],
        members: Sequence[MemberRecord] = (),
    ) -> None:
        """Start saving; called by every rank, when no save is under way.

        `pieces`: what this rank holds, by set (`model.safetensors`), the same at every save of a run; of what several
        ranks hold, the first one's is written. `blobs`, `state`, `members`: the first rank's count, see
        `write_checkpoint`.
        """
        assert self._flight is None, "one save at a time"
        fragments = {name: [one for piece in held for one in fragments_of(piece)] for name, held in pieces.items()}
        if self._plan is None:
            self._plan = make_plan(gather_objects(offer(fragments)), self.rank)
            self._table_bytes = len(json.dumps(tables_to_json(self._plan.tables), indent=1))
        files = self._plan.tensors(fragments)
        if self.rank:
            blobs = {}
        sizes = gather_objects(space_needed(files, blobs))
        needed = sum(sizes) + self._table_bytes
        flight = _Flight(step, self.run_dir / step_name(step), deepcopy(dict(state)), members, "")
        flight.problem = broadcast_object(self._begin(flight, [*files, *blobs], needed))
        if not flight.problem:
            written = self._snapshot.take(files) if self.asynchronous else files
            flight.job = _Job(lambda: self._write(flight.folder, written, blobs, needed))
        self._flight = flight

    def advance(self) -> Saved | None:
        """Go on to the next phase; called by every rank, once none is busy. How the save ended, if it did.

        Raises what went wrong on this rank when it is not the disk's or the user's fault.
        """
        flight = self._flight
        if flight is None:
            return None
        result, problem = flight.job.outcome() if flight.job else ({}, flight.problem)
        if flight.publishing:
            problem = broadcast_object(problem)
        else:
            found: list[tuple[Mapping[str, FileRecord], str]] = gather_objects((result, problem))
            problem = next((problem for _, problem in found if problem), "")
            if not problem:
                records = {name: record for written, _ in found for name, record in written.items()}
                flight.publishing = True
                flight.job = _Job(lambda: self._publish(flight, records)) if self.rank == 0 else None
                return None
        if problem:
            if self.rank == 0:
                abandon_folder(flight.folder)
            broadcast_object(None)  # nobody goes on before it is gone
        self._flight = None
        return Saved(flight.step, flight.folder, problem)

    def wait(self) -> Saved | None:
        """How the save under way ends; None when there is none. Called by every rank.

        No collective waits long, so that a slow disk does not look like a rank that hangs.
        """
        saved, pause = None, 0.001
        while self.in_flight:
            while any(gather_objects(self.busy)):
                time.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
            saved = self.advance()
        return saved

    def _begin(self, flight: _Flight, names: Sequence[str], needed: int) -> str:
        """On the first rank: make the hidden folder. Returns the problem."""
        if self.rank:
            return ""
        try:
            begin_step(self.run_dir, flight.step, names, needed)
        except UserError as error:
            return str(error)
        return ""

    def _write(self, folder: Path, files: TensorFiles, blobs: Mapping[str, bytes], needed: int) -> Any:
        records = write_files(folder, files, blobs, needed)
        if self.rank and records:  # the first rank syncs the folder for all, but only its own machine's view of it
            sync_folder(beside(folder, "tmp"))
        return records

    def _publish(self, flight: _Flight, records: Mapping[str, FileRecord]) -> None:
        assert self._plan is not None
        publish_step(
            self.run_dir,
            flight.step,
            records,
            self._plan.tables,
            flight.state,
            flight.members,
            keep_last=self.keep_last,
        )
