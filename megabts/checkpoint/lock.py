"""One training run per run folder: the file `.lock` names the process that owns it.

The owner is known by host, process id and start time of that process (a restarted container hands out the same ids
again). A lock left by a killed process of this host is taken over. Whether a process on another host lives cannot be
seen from here, so its lock is respected and the message says how to remove it. The file stays behind, empty.
"""

import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megabts.errors import UserError

LOCK_FILE = ".lock"
log = logging.getLogger(__name__)


class RunLock:
    """Context manager: owns `run_dir` while it is open. Raises UserError naming the owner when there is another."""

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / LOCK_FILE
        self.me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())}

    def __enter__(self) -> "RunLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # only while we look and write; children never inherit it
                self._take(file)
        except OSError as error:
            raise UserError(
                f"cannot lock the run folder: {self.path}: {error.strerror}; use a writable folder"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with open(self.path, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _read_owner(file) == self.me:
                    file.truncate(0)
        except OSError as failure:
            log.warning("could not release %s: %s", self.path, failure.strerror)

    def _take(self, file: TextIO) -> None:
        owner = _read_owner(file)
        if owner is not None:
            name = f"process {owner['pid']} on host {owner['host']}"
            if owner["host"] != self.me["host"]:
                raise UserError(
                    f"{self.path.parent} is in use by {name}; stop that run, or if it is dead delete {self.path}"
                )
            if _start_time(owner["pid"]) == owner["started"] is not None:
                raise UserError(f"{self.path.parent} is in use by {name}; stop that run or use another folder")
            log.warning("taking over %s, left by %s, which is gone", self.path, name)
        file.truncate(0)
        json.dump(self.me, file)


def _read_owner(file: TextIO) -> dict[str, Any] | None:
    """The recorded owner; None for an empty or half-written file, which a crash in mid-write leaves."""
    file.seek(0)
    try:
        owner = json.load(file)
        return owner if {"host", "pid", "started"} <= owner.keys() else None
    except (ValueError, AttributeError):
        return None


def _start_time(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; None when it is gone (or dead but unreaped)."""
    try:
        # The name in parentheses may hold spaces. After it: the state (field 3), ..., the start time (field 22).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
