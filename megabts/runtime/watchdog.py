"""A thread in every rank that sees to it that a hang is named and ends, and that no rank outlives the others.

Every watchdog sends beats to the ranks' store and looks there for failures. When its own main thread has made no
progress for the time-out it reads all beats; `megabts.runtime.verdict` decides who hangs. The first to decide counts a
failure as `megabts.runtime.failure` does, so a run has one reason for its end. The rank that hangs tells where it
stands; if it cannot, a neighbour on its host does, has the interpreter's signal handler dump its stack, and kills it
(torchrun would wait 30 s). The others leave.

Limit: a rank that does not answer and has no neighbour on its host is named, but its stack is not shown.
"""

import faulthandler
import json
import math
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

from torch.distributed import DistError

from megabts.runtime.progress import Progress, Sampler, stacks, where
from megabts.runtime.rendezvous import ANSWER, Meeting, process_stat
from megabts.runtime.verdict import Beat, StragglerWatch, Verdict, find_hang

SAMPLE = 0.02
"""Seconds between two looks at the stacks; a look takes some ten microseconds."""
WINDOW = 8
"""A rank is silent when none of its beats came in so many intervals; on a loaded machine some come late."""
GRACE = 3.0
"""Seconds that a rank gets to leave in good order after another failed."""
LIKELY = {
    "T": "stopped by a signal (SIGSTOP)",
    "t": "stopped by a debugger",
    "D": "waits in the kernel, for a disk or a driver",
    "Z": "its process died",
    "": "its process is gone",
}
"""What a process state in /proc means for a rank that does not answer."""


@contextmanager
def watched(meeting: Meeting | None, timeout: float) -> Iterator[Progress]:
    """Inside the block a watchdog looks after this rank (alone: none does). `timeout`: seconds without progress.

    Leaving it in good order waits for the other ranks, where the first one keeps the store.
    """
    progress = Progress()
    if meeting is None:
        yield progress
        return
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    watchdog = _Watchdog(meeting, timeout, progress)
    watchdog.start()
    try:
        yield progress
        progress.enter("done")
        watchdog.finish()
    finally:
        watchdog.stop.set()
        watchdog.join(timeout=2 * GRACE)
        faulthandler.unregister(signal.SIGUSR2)


class _Watchdog(threading.Thread):
    def __init__(self, meeting: Meeting, timeout: float, progress: Progress) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.meeting, self.timeout, self.progress = meeting, timeout, progress
        self.interval = min(1.0, timeout / 20)
        self.rank, self.size = meeting.me.rank, len(meeting.ranks)
        self.stop = threading.Event()
        self.sampler = Sampler(progress)
        self.stragglers = StragglerWatch()
        self.store = meeting.connect()
        self.asked = math.inf
        self.count = 0
        self.recent: deque[list[Beat | None]] = deque(maxlen=WINDOW + 1)
        self._beat()

    def run(self) -> None:
        """Sample, until the main thread leaves in good order; another thread talks to the store, which may be mute."""
        talker = threading.Thread(target=self._talk, name="watchdog's talker", daemon=True)
        talker.start()
        while not self.stop.wait(SAMPLE):
            self.sampler.sample()
            if time.monotonic() - self.asked > ANSWER.total_seconds() and self.sampler.idle >= self.timeout:
                self._conclude_alone()
        talker.join(timeout=2 * GRACE)

    def _talk(self) -> None:
        while not self.stop.wait(self.interval):
            self.asked = time.monotonic()
            try:
                self._tick()
            except DistError:
                self._lose_store()
            self.asked = math.inf
        with suppress(DistError):
            if self.store.check(["verdict"]):  # the main thread may have failed of it; it is still to be told
                self._end(Verdict(**json.loads(self.store.get("verdict"))))

    def finish(self) -> None:
        """In the main thread, at the end: where the first rank keeps the store, it is the last to leave."""
        store = self.meeting.store
        store.set(f"done/{self.rank}", "")
        keys = [f"done/{rank}" for rank in range(self.size)]
        while self.meeting.hosted and self.rank == 0 and not store.check(keys):
            time.sleep(0.05)  # the watchdog ends it if a rank never comes

    def _tick(self) -> None:
        self._beat()
        if self.store.check(["failed"]):
            self._leave()
        if self.rank == 0:
            self._look_for_stragglers()
        idle = self.sampler.idle
        if idle < self.timeout - WINDOW * self.interval:
            self.recent.clear()
            return
        self.recent.append(self._read_beats())
        if idle >= self.timeout and len(self.recent) > WINDOW:
            self._judge()

    def _beat(self) -> None:
        sampler, stand = self.sampler, self.sampler.seen
        self.count += 1
        done = stand.phase == "done"
        beat = Beat(
            count=self.count,
            step=stand.step,
            moves=stand.moves,
            phase=stand.phase,
            waiting=sampler.waiting or done,
            where=where(),
            idle=sampler.idle,
            busy=sampler.busy,
            wall=sampler.wall,
            timed=stand.timed,
            role=self.progress.role,
        )
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def _read_beats(self) -> list[Beat | None]:
        keys = [f"beat/{rank}" for rank in range(self.size)]
        if not self.store.check(keys):
            return [self._read_beat(rank) for rank in range(self.size)]
        return [Beat(**json.loads(text)) for text in self.store.multi_get(keys)]

    def _read_beat(self, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat(**json.loads(self.store.get(key))) if self.store.check([key]) else None

    def _look_for_stragglers(self) -> None:
        found = self.stragglers.look(self._read_beats())
        if found:
            _say(
                f"warning: {self.meeting.ranks[found.rank]} is slow: at step {self.sampler.seen.step} it works "
                f"{found.ratio:.1f} times as long per step as the median of its like, which wait for it; look at the "
                "load and the clock rates of its host"
            )

    def _judge(self) -> None:
        verdict = find_hang(self.recent[0], self.recent[-1], self.timeout, slack=3 * self.interval)
        if verdict is None:
            return
        if self.store.add("failed", 1) == 1:
            self.store.set("verdict", json.dumps(asdict(verdict)))
        self._leave()

    def _leave(self) -> None:
        """Another rank failed, or one hangs: the main thread gets a while to leave by itself."""
        self.asked = math.inf
        # The store may go with the first rank, which waits for the others: they must be gone by then, or they would
        # take the broken connections for the failure.
        goes_first = self.meeting.hosted and self.rank > 0
        if not goes_first:
            self.store.set(f"noticed/{self.rank}", "")
        end = time.monotonic() + (1 if goes_first else GRACE)
        while time.monotonic() < end and not self.stop.is_set():
            if self.store.check(["verdict"]):
                self._end(Verdict(**json.loads(self.store.get("verdict"))))
            time.sleep(0.1)
        if goes_first:
            self.store.set(f"noticed/{self.rank}", "")
        if not self.stop.is_set():
            os._exit(1)

    def _end(self, verdict: Verdict) -> None:
        """End this rank, and the one that hangs; told by one rank, for which the others wait."""
        if self.rank == _speaker(verdict, self.meeting):
            beat = self._read_beat(verdict.rank)
            _tell(verdict, beat, self.meeting)
            self.store.set("told", "")
        end = time.monotonic() + 2 * GRACE
        while not self.store.check(["told"]) and time.monotonic() < end:
            time.sleep(0.1)
        if self.meeting.hosted and self.rank == 0:
            time.sleep(1)  # the others have still to hear of it
        os._exit(1)

    def _lose_store(self) -> None:
        """The connection broke: torchrun or the first rank is gone, or it was the network."""
        if not _refuses(self.meeting.address):
            with suppress(DistError):
                self.store = self.meeting.connect()
            return
        if not self.stop.wait(GRACE):
            keeper = self.meeting.ranks[0] if self.meeting.hosted else "torchrun"
            if self.rank == (1 if self.meeting.hosted else 0):
                _say(f"error: lost contact with {keeper}: it ended or was killed; look at its log")
            os._exit(1)

    def _conclude_alone(self) -> None:
        """The store does not answer, and nothing goes on: who keeps it is stopped. Ranks cannot ask each other."""
        verdict = Verdict(0, True, tuple(range(1, self.size)), "the others wait for it", self.timeout)
        if not self.meeting.hosted:
            _say("error: torchrun hangs: its store does not answer; see whether it is stopped")
        elif self.rank == _speaker(verdict, self.meeting):
            _tell(verdict, None, self.meeting)
        else:
            time.sleep(GRACE / 2)
        os._exit(1)


def _speaker(verdict: Verdict, meeting: Meeting) -> int:
    """Who tells of it: the rank itself, else a neighbour that can signal it, else any."""
    if not verdict.silent:
        return verdict.rank
    space = meeting.ranks[verdict.rank].pid_space
    near = [rank for rank in verdict.alive if meeting.ranks[rank].pid_space == space]
    return min(near or verdict.alive)


def _tell(verdict: Verdict, beat: Beat | None, meeting: Meeting) -> None:
    """The line on a rank that hangs, and its stack; one that does not answer is killed, if it is on this host."""
    culprit = meeting.ranks[verdict.rank]
    own, near = culprit == meeting.me, culprit.pid_space == meeting.me.pid_space
    state, started = process_stat(culprit.pid)
    same = near and started == culprit.started
    seen = "" if own else "last seen at "
    facts = [f"{seen}step {beat.step}, in {beat.phase}, {where() if own else beat.where}"] if beat else []
    facts.append(f"no progress for {verdict.seconds:g} s")
    if own:
        facts.append(verdict.others)
    elif near:
        held = "its interpreter is held by a call into C"
        facts.append(LIKELY.get(state, held) if same else LIKELY[""])
    facts.append("look at the stack below, " if own or same else "no rank of its host is left to show its stack, ")
    facts[-1] += "then start again with --checkpoint.resume true; if it is only slow, raise parallel.timeout"
    _say(f"error: {culprit} hangs: {'; '.join(facts)}")
    if own or same:
        _say(f"stacks of rank {verdict.rank}, its threads' one after the other:")
    if own:
        _say(stacks().rstrip())
    elif same:
        _dump_and_kill(culprit.pid)


def _dump_and_kill(pid: int) -> None:
    """Have the process's own handler write its stacks to its stderr (a stopped one must go on for it), then kill it."""
    try:
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.7)
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return  # it ended by itself


def _refuses(address: tuple[str, int]) -> bool:
    """Whether nobody listens there any more; a stopped process still does."""
    try:
        socket.create_connection(address, timeout=2).close()
    except ConnectionError:
        return True
    except OSError:
        return False
    return False


def _say(text: str) -> None:
    """One write to stderr, past buffers and locks that the main thread may hold."""
    os.write(2, f"{text}\n".encode())
