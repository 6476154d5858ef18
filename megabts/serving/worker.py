"""The thread that owns the model: it takes jobs from a queue, steps the engines, and tells what happened.

Others talk to it through `submit`, `cancel` and `stop`, which only put messages into a queue; it answers through
`post`, a function that hands updates to the thread they are for. Between two steps it carries out everything that came,
so a cancelled completion is not in the next batch.

There is an engine for the whole model, and one for each set of experts left out, with caches of its own; MAX_VARIANTS
of those are kept, and the one that was not used for the longest time gives way.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megabts.bts.model import BTSModel
from megabts.errors import UserError
from megabts.inference.engine import Engine
from megabts.inference.rows import Completion, Event, Request
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.progress import Progress
from megabts.serving.errors import ApiError, refuse
from megabts.serving.metrics import Metrics
from megabts.serving.served import Served
from megabts.serving.variants import without_experts

MAX_VARIANTS = 2
HEARTBEAT = 5.0
"""Seconds without work after which other ranks are told so."""


@dataclass(eq=False)
class Job:
    """One request's completions."""

    rows: Sequence[Request]
    without: frozenset[str] = frozenset()
    came: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Told:
    """What a step did to one completion of a job."""

    index: int
    event: Event


Update = Told | ApiError
"""News of a job; an error is its last."""
Post = Callable[[list[tuple[Job, Update]]], None]


@dataclass(eq=False)
class _Row:
    """A completion that an engine has."""

    job: Job
    index: int
    completion: Completion
    last: float | None = None
    """When its last token came."""


class _Batch:
    """An engine and whose its completions are."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: dict[int, _Row] = {}
        self.used = time.monotonic()

    def step(self, metrics: Metrics) -> list[tuple[Job, Update]]:
        """One token for every row."""
        self.used = time.monotonic()
        events, now = self.engine.step(), time.perf_counter()
        told: list[tuple[Job, Update]] = []
        for event in events:
            row = self.rows[event.id]
            if row.last is None:
                metrics.first_token.observe(now - row.job.came)
                metrics.prompt_tokens.inc(len(row.completion.request.prompt))
            else:
                metrics.token.observe(now - row.last)
            row.last = now
            if event.token is not None:
                metrics.new_tokens.inc()
            if event.finish is not None:
                del self.rows[event.id]
            told.append((row.job, Told(row.index, event)))
        return told


class Worker:
    """Runs jobs until it is stopped, or fails: then `failure` says why, all jobs end with an error, `failed` is called.

    `post` and `failed` are called on its thread.
    """

    def __init__(
        self,
        served: Served,
        metrics: Metrics,
        post: Post,
        failed: Callable[[], None],
        *,
        mesh: ParallelMesh | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.served = served
        self.metrics = metrics
        self.failure: BaseException | None = None
        self._post, self._failed, self._mesh = post, failed, mesh
        self._messages: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        limits = served.limits
        whole = Engine(
            served.model,
            limits.max_rows,
            limits.max_tokens,
            tokenizer=served.tokenizer,
            mesh=mesh,
            progress=progress,
            cuda_graphs=served.cuda_graphs,
        )
        self._batches: dict[frozenset[str], _Batch] = {frozenset(): _Batch(whole)}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Begin a job as soon as there is room for it."""
        self._messages.put(("submit", job))

    def cancel(self, job: Job) -> None:
        """End what of a job has not ended; it is told nothing more after the step in progress."""
        self._messages.put(("cancel", job))

    def stop(self, seconds: float) -> bool:
        """End after the step in progress; whether the thread did, within this time."""
        self._messages.put(("stop", None))
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self._batches[frozenset()].engine:
                while not self._stopping:
                    self._take()
                    for batch in list(self._batches.values()):
                        if batch.engine.busy:
                            self._tell(batch.step(self.metrics))
        except BaseException as error:  # whatever it was: clients and the process are told, not this thread alone
            self.failure = error
            self._failed()

    def _tell(self, updates: list[tuple[Job, Update]]) -> None:
        if updates:
            self._post(updates)

    def _take(self) -> None:
        """Carry out what came; wait for something where there is nothing else to do."""
        busy = any(batch.engine.busy for batch in self._batches.values())
        several = self._mesh is not None and self._mesh.world_size > 1
        while True:
            self.metrics.running.set(sum(batch.engine.num_running for batch in self._batches.values()))
            self.metrics.waiting.set(sum(batch.engine.num_waiting for batch in self._batches.values()))
            try:
                what, job = self._messages.get(not busy, HEARTBEAT if several else None)
            except queue.Empty:
                if not busy and several:
                    self._batches[frozenset()].engine.step()
                return
            if job is None:
                self._stopping = True
                return
            self._submit(job) if what == "submit" else self._cancel(job)
            busy = True

    def _submit(self, job: Job) -> None:
        try:
            batch = self._batch(job.without)
            for index, request in enumerate(job.rows):
                completion = batch.engine.submit(request)
                batch.rows[completion.id] = _Row(job, index, completion)
        except (ApiError, UserError) as error:
            self._cancel(job)
            self._tell([(job, error if isinstance(error, ApiError) else refuse(str(error)))])

    def _cancel(self, job: Job) -> None:
        batch = self._batches.get(job.without)
        for row in [] if batch is None else [row for row in batch.rows.values() if row.job is job]:
            assert batch is not None
            batch.engine.cancel(row.completion)
            del batch.rows[row.completion.id]
            self.metrics.cancelled.inc()

    def _batch(self, without: frozenset[str]) -> _Batch:
        """The engine for a set of experts left out. Raises ApiError while all that may be kept are in use."""
        if without not in self._batches:
            variants = [names for names in self._batches if names]
            if len(variants) >= MAX_VARIANTS:
                idle = [names for names in variants if not self._batches[names].engine.busy]
                if not idle:
                    raise ApiError(
                        429,
                        f"{MAX_VARIANTS} other sets of experts are left out by requests in progress; try again",
                        "without",
                        "variants_busy",
                        {"Retry-After": "1"},
                    )
                del self._batches[min(idle, key=lambda names: self._batches[names].used)]
            served = self.served
            assert isinstance(served.model, BTSModel)
            model = without_experts(served.model, sorted(without))
            try:
                engine = Engine(
                    model,
                    served.limits.max_rows,
                    served.room(True),
                    tokenizer=served.tokenizer,
                    cuda_graphs=served.cuda_graphs,
                )
            except torch.OutOfMemoryError:
                raise ApiError(503, "there is no memory for caches without these experts", "without") from None
            self._batches[without] = _Batch(engine)
        return self._batches[without]
