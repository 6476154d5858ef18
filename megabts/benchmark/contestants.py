"""Contestants in processes of their own: the allocator, caches and imports of one are no matter to the others.

    with Contestant(partial(make_ours, "S")) as ours, Contestant(partial(make_theirs, "S")) as theirs:
        seconds = interleaved({"ours": ours.run, "theirs": theirs.run}, rounds=5)
        peak = ours.peak_bytes()

A contestant is made from a function at the top of a module (a new process imports it by name) that prepares, and
returns what a round runs. Between rounds the process waits at a pipe and uses no core. It ends with its `with` block,
and by itself when the process that started it is gone; an interrupt is that one's business.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Literal

from megabts.benchmark.machine import peak_bytes
from megabts.benchmark.profiles import write_profile
from megabts.benchmark.suite import Settings
from megabts.errors import UserError

Round = Callable[[], float | None]
"""Runs one round; returns the seconds that count, or None: all that it took."""
Order = Literal["run", "peak", "profile"]
_END_SECONDS = 5.0
"""That a process which has closed its pipe may take to end by itself, and so have an exit code of its own."""


class Contestant:
    """A process in which `make()` has been called, ready to run rounds.

    `make`, `peak` and what they are bound to must be picklable. `name` is for errors; `peak` is asked for the process's
    memory. Raises UserError, here or in `run`, when something fails or dies in the process, which is ended then.
    """

    def __init__(self, make: Callable[[], Round], name: str = "", peak: Callable[[], int] = peak_bytes) -> None:
        self.name = name or str(getattr(getattr(make, "func", make), "__name__", make))
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, peak), daemon=True)
        try:
            self._process.start()
            theirs.close()
            self._answer()
        except BaseException:
            self.close()
            raise

    def run(self) -> float:
        """One round; its seconds, as measured in the process."""
        return self._ask("run")

    def peak_bytes(self) -> int:
        """Most memory that the process had at one time so far (or what `peak` says): imports and preparations count."""
        return int(self._ask("peak"))

    def profile(self, settings: Settings, row: str) -> None:
        """One more round, profiled in the process into a file named after the row, where profiles are asked for."""
        if settings.profile is not None:
            path = settings.profile / f"{row}.txt"
            self._ask("profile", path)
            settings.progress(f"profile: {path}")

    def close(self) -> None:
        """End the process: one that waits ends by itself and tidies up, any other is killed after some seconds."""
        self._pipe.close()
        if self._process.pid is not None:
            self._process.join(_END_SECONDS)
            self._process.kill()
            self._process.join()

    def __enter__(self) -> "Contestant":
        """The contestant, closed when the block ends."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """See `__enter__`."""
        self.close()

    def _ask(self, order: Order, *arguments: Path) -> float:
        with suppress(OSError):  # it is gone: the answer says so
            self._pipe.send((order, *arguments))
        return self._answer()

    def _answer(self) -> float:
        try:
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_END_SECONDS)
            self.close()
            code = self._process.exitcode
            raise UserError(f"{self.name}: its process is gone (exit code {code}); is there enough memory?") from None
        if not good:
            self.close()
            raise UserError(f"{self.name}: {answer}")
        return float(answer)


def _serve(pipe: Connection, make: Callable[[], Round], peak: Callable[[], int]) -> None:
    """What the process does: make, then rounds as they are asked for, until the pipe ends or something fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders: dict[Order, Callable[..., float]] = {"peak": peak}

    def begin() -> float:
        run = make()
        orders["run"], orders["profile"] = partial(_timed, run), partial(write_profile, run)
        return 0.0

    work: Callable[[], float] = begin
    good = True
    with suppress(EOFError, OSError):  # of the pipe, whose other end has gone
        while good:
            good, answer = _outcome(work)
            pipe.send((good, answer))
            order, *arguments = pipe.recv()
            work = partial(orders[order], *arguments)


def _outcome(work: Callable[[], float]) -> tuple[bool, float | str]:
    """(True, what it returned) or (False, what is wrong, in one line)."""
    try:
        return True, work()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return False, first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _timed(run: Round) -> float:
    start = time.perf_counter()
    own = run()
    return time.perf_counter() - start if own is None else own
