"""How far a rank is: what its main thread says of itself, and what its stack shows to a thread that looks on."""

import linecache
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

import torch

import megabts

_OURS = str(Path(megabts.__file__).parents[1]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_WAITING_FILES = (f"{_TORCH}distributed{os.sep}", f"{_TORCH}cuda{os.sep}")
_WAITING_CALLS = (".wait(", ".item(", ".tolist(", ".cpu(")
"""Calls into C that leave no frame of their own: a collective's handle, and values that a device still computes."""


class Progress:
    """Where the main thread is. It alone writes; the watchdog reads."""

    def __init__(self) -> None:
        self.stand = Stand()
        self.first_step = 0
        self.role = ""

    def enter(self, phase: str, step: int | None = None, timed: bool = True) -> None:
        """Begin a phase of a step (from 1; None: the step stays). That is progress, also where the phase is the same.

        `timed`: all ranks have like work in it, so that one that takes longer is slow. In a run's first step, which
        imports, compiles and allocates, nothing is.
        """
        last = self.stand
        step = last.step if step is None else step
        self.first_step = self.first_step or step
        moves = last.moves + 1 if step == last.step else 0
        self.stand = Stand(step, moves, phase, timed and step > self.first_step)

    def take_role(self, role: str) -> None:
        """Name the work this rank does; ranks of one role have the same amount of it and are compared."""
        self.role = role


@dataclass(frozen=True)
class Stand:
    """One place in a run."""

    step: int = 0
    moves: int = 0
    """Phases entered since the step began."""
    phase: str = "the start"
    timed: bool = False


class Sampler:
    """Looks at the other threads' stacks now and then: does this rank work, or wait for others?

    `busy` of `wall` seconds of timed phases went into work. A sample stands for the time since the last one.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.busy = self.wall = 0.0
        self.waiting = False
        self.seen = progress.stand
        self.moved = self.last = time.monotonic()

    def sample(self) -> None:
        """Take one sample."""
        now, stand = time.monotonic(), self.progress.stand
        if stand is not self.seen:
            self.seen, self.moved = stand, now
        self.waiting = is_waiting()
        if stand.timed:
            self.wall += now - self.last
            self.busy += 0 if self.waiting else now - self.last
        self.last = now

    @property
    def idle(self) -> float:
        """Seconds since the main thread last entered a phase."""
        return time.monotonic() - self.moved


def is_waiting() -> bool:
    """Whether a thread other than the caller stands in a collective, or waits for a device."""
    return any(_waits(frame) for frame in _other_threads())


def where() -> str:
    """`FILE:LINE function` of the main thread: the innermost frame of this repository, or at all."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame and not _own(frame):
        frame = frame.f_back
    return _name(frame or innermost)


def stacks() -> str:
    """The stacks of all threads but the caller's, the main thread's first; most recent call last."""
    return "".join(
        f"thread {number}, most recent call last:\n" + "".join(traceback.format_stack(frame))
        for number, frame in enumerate(_other_threads())
    )


def _other_threads() -> list[FrameType]:
    main, me = threading.main_thread().ident, threading.get_ident()
    frames = sys._current_frames()
    return [frames[ident] for ident in sorted(frames, key=lambda ident: ident != main) if ident != me]


def _waits(frame: FrameType | None) -> bool:
    """Looks no further out than to the first frame of ours: every frame looked at costs its thread some time."""
    if frame and _own(frame):
        return _is_waiting_line(frame.f_code.co_filename, frame.f_lineno)
    while frame and not _own(frame):
        if frame.f_code.co_filename.startswith(_WAITING_FILES):
            return True
        frame = frame.f_back
    return False


@cache
def _is_waiting_line(file: str, number: int) -> bool:
    line = linecache.getline(file, number)
    return any(call in line for call in _WAITING_CALLS)


def _own(frame: FrameType) -> bool:
    """Whether its file is of this repository, and not of an environment that stands in it."""
    return _is_own_file(frame.f_code.co_filename)


@cache
def _is_own_file(file: str) -> bool:
    return file.startswith(_OURS) and "site-packages" not in file


def _name(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown place"
    file = frame.f_code.co_filename.removeprefix(_OURS)
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
