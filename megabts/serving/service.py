"""Between the requests, which live on the event loop, and the worker, which lives on a thread of its own."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.progress import Progress
from megabts.serving.errors import ApiError
from megabts.serving.metrics import Metrics
from megabts.serving.requests import Asked
from megabts.serving.served import Served
from megabts.serving.worker import Job, Told, Update, Worker


class Call:
    """A request in progress: what the worker tells of it, in order."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.updates: asyncio.Queue[Update] = asyncio.Queue()
        self.open = len(job.rows)
        """Completions that have not ended."""

    async def told(self) -> AsyncIterator[Told]:
        """Every update until all completions have ended. Raises ApiError where the request fails."""
        while self.open:
            update = await self.updates.get()
            if isinstance(update, ApiError):
                raise update
            self.open -= update.event.finish is not None
            yield update


class Service:
    """A model that answers requests; used on one event loop, where `start` is called.

    `failed`: set when the worker failed. `ended`: set when requests in progress must end.
    """

    def __init__(self, served: Served, *, mesh: ParallelMesh | None = None, progress: Progress | None = None) -> None:
        self.served = served
        self.metrics = Metrics()
        self.failed = asyncio.Event()
        self.ended = asyncio.Event()
        self._calls: dict[Job, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.worker = Worker(served, self.metrics, self._post, self._fail, mesh=mesh, progress=progress)

    def start(self) -> None:
        """Begin to work, for requests on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    @contextmanager
    def call(self, asked: Asked) -> Iterator[Call]:
        """A request's call, inside a block; what has not ended with the block is cancelled.

        Raises ApiError when the server is full, or is ending.
        """
        limits, taken = self.served.limits, sum(call.open for call in self._calls.values())
        if self.worker.failure is not None or self.ended.is_set():
            raise self.why()
        if taken + len(asked.rows) > limits.max_rows + limits.queue:
            raise ApiError(
                429,
                f"{taken} completions run or wait, and the server takes {limits.max_rows + limits.queue}; try again",
                None,
                "queue_full",
                {"Retry-After": "1"},
            )
        call = Call(Job(asked.rows, asked.without))
        self._calls[call.job] = call
        self.worker.submit(call.job)
        try:
            yield call
        finally:
            del self._calls[call.job]
            if call.open:
                self.worker.cancel(call.job)

    def end(self) -> None:
        """End the requests in progress with an error."""
        self.ended.set()
        for call in self._calls.values():
            call.updates.put_nowait(self.why())

    def why(self) -> ApiError:
        """Why no request is answered any more."""
        if self.worker.failure is not None:
            return ApiError(500, "the model failed and the server ends; its log says why", None, "engine_failed")
        return ApiError(503, "the server is shutting down", None, "shutting_down", {"Retry-After": "5"})

    def _post(self, updates: list[tuple[Job, Update]]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._receive, updates)

    def _receive(self, updates: list[tuple[Job, Update]]) -> None:
        for job, update in updates:
            if job in self._calls:
                self._calls[job].updates.put_nowait(update)

    def _fail(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._failed_here)

    def _failed_here(self) -> None:
        self.failed.set()
        self.end()
