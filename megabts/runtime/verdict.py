"""Which rank hangs, and which is slow: judged from what the ranks last said of themselves. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

PATIENCE = 4
"""Only after so many time-outs is it a hang where one rank may have long work that others have not (the start, the
first step, validation, a save), or where no rank waits for another: all may be busy."""


@dataclass(frozen=True)
class Beat:
    """What a rank's watchdog says a few times per time-out."""

    count: int
    """Grows with every beat: it stands still when the process does."""
    step: int
    moves: int
    phase: str
    waiting: bool
    """In a collective, or done: it cannot be the one the others wait for."""
    where: str
    idle: float
    """Seconds since the main thread's last progress, when the beat was sent."""
    busy: float
    wall: float
    """Seconds so far in timed phases; `busy`: those not spent waiting."""
    timed: bool
    """Whether the phase is one in which all ranks have like work."""
    role: str


@dataclass(frozen=True)
class Verdict:
    """A rank that hangs."""

    rank: int
    silent: bool
    """Even its watchdog is: the process is stopped, gone, or holds the interpreter."""
    alive: tuple[int, ...]
    """Ranks whose watchdogs speak."""
    others: str
    """What the other ranks do, in words."""
    seconds: float
    """Without progress, at least."""


def find_hang(
    before: Sequence[Beat | None], now: Sequence[Beat | None], timeout: float, slack: float
) -> Verdict | None:
    """The rank that keeps the others waiting; None while any makes progress.

    `before` and `now`: all ranks' last beats at two times, several beats apart; None for a rank that never sent one.
    `slack`: seconds by which the ranks' beats and last progress may differ. In this order: a rank that fell silent, one
    that does not wait while others do, and where all wait (or none does, for long) the one that is least far. A rank
    in a phase that is not timed gets `PATIENCE` time-outs.
    """
    silent = [rank for rank, (old, new) in enumerate(zip(before, now, strict=True)) if _fell_silent(old, new)]
    beats = {rank: beat for rank, beat in enumerate(now) if beat is not None and rank not in silent}
    if any(beat.idle + slack < timeout for beat in beats.values() if beat.phase != "done"):
        return None
    alive = tuple(beats)
    if silent:
        return Verdict(silent[0], True, alive, "the others wait for it", timeout)
    stuck = [rank for rank in beats if not beats[rank].waiting]
    least = min(stuck or beats, key=lambda rank: (beats[rank].step, beats[rank].moves, rank))
    none_waits = len(stuck) == len(beats)
    seconds = timeout if beats[least].timed and not none_waits else PATIENCE * timeout
    if beats[least].idle < seconds:
        return None
    if none_waits:
        others = "so do all others"
    elif stuck:
        others = f"{len(beats) - len(stuck)} of {len(beats)} ranks wait for others"
    else:
        others = "all ranks wait, and it is least far"
    return Verdict(least, False, alive, others, seconds)


def _fell_silent(old: Beat | None, new: Beat | None) -> bool:
    return new is None or (old is not None and old.count == new.count and new.phase != "done")


@dataclass(frozen=True)
class Slowness:
    """A rank that works longer than its like while they wait."""

    rank: int
    ratio: float


class StragglerWatch:
    """Finds a rank that works more than twice as long per step as the median of the others of its role.

    Steps end together, so shares of the same time compare: `busy / wall` over a window of at least 8 steps and 1.5 s
    (that many samples tell a half from all). Slow in two windows running, and by a quarter of the step: named, and not
    again for 100 steps.
    """

    steps, seconds, factor, excess, repeat = 8, 1.5, 2.0, 0.25, 100

    def __init__(self) -> None:
        self.start: list[Beat] = []
        self.suspect = -1
        self.named: dict[int, int] = {}

    def look(self, beats: Sequence[Beat | None]) -> Slowness | None:
        """Take in all ranks' last beats; a rank to be named, or None."""
        present = [beat for beat in beats if beat is not None]
        if len(present) < len(beats):
            return None
        if not self.start:
            self.start = present
        old = self.start
        if min(b.step - a.step for a, b in zip(old, present, strict=True)) < self.steps:
            return None
        if min(b.wall - a.wall for a, b in zip(old, present, strict=True)) < self.seconds:
            return None
        self.start = present
        shares = [(b.busy - a.busy) / (b.wall - a.wall) for a, b in zip(old, present, strict=True)]
        found = self._slowest(shares, [beat.role for beat in present])
        again = found is not None and found.rank == self.suspect
        self.suspect = found.rank if found else -1
        if found is None or not again:
            return None
        step = present[found.rank].step
        if step - self.named.get(found.rank, -self.repeat) < self.repeat:
            return None
        self.named[found.rank] = step
        return found

    def _slowest(self, shares: list[float], roles: list[str]) -> Slowness | None:
        slow = []
        for rank, share in enumerate(shares):
            others = [shares[other] for other, role in enumerate(roles) if role == roles[rank] and other != rank]
            if others and share > self.factor * median(others) and share > median(others) + self.excess:
                slow.append(Slowness(rank, share / max(median(others), 0.01)))
        return max(slow, key=lambda one: one.ratio, default=None)
