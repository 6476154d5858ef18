"""Ends processes and all that they started."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

POLL = 0.05
"""Seconds between looks at running processes."""


def stop(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """End the commands and every process below them, sessions of their own (torchrun's workers) included.

    SIGTERM, and `grace` seconds later SIGKILL to what is left. Returns when none is, or a second after that.
    """
    targets = _below(processes)
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 1.0)):
        targets |= _below(processes)
        for pid in targets:
            _signal(pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            ended = [process.poll() is not None for process in processes]
            if all(ended) and not any(_alive(pid) for pid in targets):
                return
            time.sleep(POLL)


def _below(processes: Sequence[subprocess.Popen[bytes]]) -> set[int]:
    """Ids of the living commands, their descendants, and what else is in their sessions (Linux; commands elsewhere)."""
    roots = {process.pid for process in processes}
    found = {process.pid for process in processes if process.poll() is None}
    table = _process_table()
    grown = True
    while grown:
        new = {pid for pid, (parent, session, _) in table.items() if session in roots or parent in found} - found
        found |= new
        grown = bool(new)
    return found


def _process_table() -> dict[int, tuple[int, int, str]]:
    """{process id: (parent, session, state)} of all processes that have not ended; empty without /proc."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if state != "Z":
            table[int(path.parent.name)] = (int(parent), int(session), state)
    return table


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return not Path("/proc/self").exists() or pid in _process_table()
    except (ProcessLookupError, PermissionError):
        return False


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
