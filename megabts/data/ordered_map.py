"""A function mapped over items by several processes: results in order, memory bounded, dead workers noticed.

Item i goes to process i mod n, and results are taken in the same order; each process has at most `_DEPTH` items, so
that one is waiting while another is worked on. The parent never waits for a process that waits for it: a thread in
every process takes items from the pipe at once. When a process dies, its pipe closes and the parent raises; when the
parent dies, the processes see their pipes close and end. A process of one thread is forked, which takes no time; a
fork of one with threads can hang, so that one's workers are spawned, and import everything again.
"""

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megabts.errors import UserError

_DEPTH = 2
_CLOSED = object()
_STOPS = (signal.SIGINT, signal.SIGTERM)
Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)` in `workers` processes. `function`, items and results travel by pickle between them.

    A UserError in `function` is raised here; so is one when a process dies. No process outlives the iteration.
    """
    crew = _Crew(function, workers)
    waiting: deque[int] = deque()
    try:
        for number, item in enumerate(items):
            while waiting and (len(waiting) == workers * _DEPTH or crew.has_result(waiting[0])):
                yield crew.receive(waiting.popleft())
            crew.send(number % workers, item)
            waiting.append(number % workers)
        while waiting:
            yield crew.receive(waiting.popleft())
    finally:
        crew.stop()


def _has_one_thread() -> bool:
    """Whether this process has one thread, those of libraries counted; only Linux says so."""
    tasks = "/proc/self/task"
    return os.path.isdir(tasks) and len(os.listdir(tasks)) == 1


class _Crew:
    """The processes and the parent's ends of their pipes; a process starts when its first item comes."""

    def __init__(self, function: Callable[[Any], Any], workers: int) -> None:
        if workers < 1:
            raise ValueError(f"{workers} workers: at least 1 is needed")
        self._function = function
        self._forks = _has_one_thread()
        self._context: ForkContext | SpawnContext
        self._context = multiprocessing.get_context("fork") if self._forks else multiprocessing.get_context("spawn")
        self._members: dict[int, tuple[BaseProcess, Connection]] = {}

    def _start(self, worker: int) -> None:
        parent_end, child_end = self._context.Pipe()
        ours = [connection for _, connection in self._members.values()] + [parent_end] if self._forks else []
        process = self._context.Process(target=_work, args=(child_end, ours, self._function), daemon=True)
        if not self._forks:
            resource_tracker.ensure_running()  # started by the first process otherwise, and it lifts the block below
        # Ctrl-C reaches the whole process group, and the parent alone shall answer it: the child inherits the block.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            process.start()
            self._members[worker] = (process, parent_end)
        except OSError as error:
            raise UserError(f"cannot start a worker process ({error.strerror}): try fewer --workers") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            child_end.close()

    def send(self, worker: int, item: Any) -> None:
        if worker not in self._members:
            self._start(worker)
        process, connection = self._members[worker]
        try:
            connection.send(item)
        except OSError as error:
            raise _death(process) from error

    def has_result(self, worker: int) -> bool:
        return self._members[worker][1].poll()

    def receive(self, worker: int) -> Any:
        process, connection = self._members[worker]
        try:
            succeeded, result = connection.recv()
        except (EOFError, OSError) as error:
            raise _death(process) from error
        if not succeeded:
            raise result
        return result

    def stop(self) -> None:
        for process, connection in self._members.values():
            connection.close()
            process.terminate()
        for process, _ in self._members.values():
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join(2)


def _death(process: BaseProcess) -> UserError:
    process.join(2)
    code = process.exitcode
    if code is not None and code < 0:
        cause = f"was killed by signal {-code} ({signal.Signals(-code).name}), often for want of memory"
        return UserError(f"a worker process {cause}: try fewer --workers")
    return UserError(f"a worker process ended (exit code {code}): what it printed says why")


def _work(connection: Connection, inherited: list[Connection], function: Callable[[Any], Any]) -> None:
    """The life of a worker process: take an item, send (True, result) or (False, exception), until the pipe closes.

    A fork has the parent's ends of pipes too, and its handler of SIGTERM. It must keep neither: a pipe closes when all
    copies of its other end are closed, and SIGTERM, blocked until now, ends a worker.
    """
    for end in inherited:
        end.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take_items, args=(connection, inbox), daemon=True).start()
    while (item := inbox.get()) is not _CLOSED:
        answer: tuple[bool, Any]
        try:
            answer = (True, function(item))
        except Exception as error:  # whatever it is belongs to the parent
            answer = (False, error)
        try:
            connection.send(answer)
        except OSError:
            return


def _take_items(connection: Connection, inbox: "queue.SimpleQueue[Any]") -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(_CLOSED)
