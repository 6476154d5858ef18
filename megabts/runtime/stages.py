"""Runs a job of several stages, each a command, in the order their needs allow and side by side where they can be.

A stage is finished when its marker file exists: JSON {"command": [...], "origin": hash, "seconds": s}, written aside
and renamed after the command ended with code 0. Running the job again keeps finished stages and goes on with the
others. The origin is a hash of the stage's command and of all commands that it needs: a stage whose origin is no longer
the marker's is run again, and so is everything that needs it.

Before a command starts, what an earlier one made is removed (`Stage.makes`). A command that can go on with its own
interrupted work keeps it, but only while its origin is the same: beside the marker stands a file `.begun` with the
origin of the command that began the work.

Commands run in a session of their own, output in their log file. Whatever ends the job early (a failed stage, Ctrl-C,
SIGTERM, SIGHUP) ends every process below them too: SIGTERM, and SIGKILL after `GRACE` seconds. A SIGKILL of this
process alone is the one thing that leaves them running.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megabts.errors import UsageError, UserError
from megabts.runtime.processes import POLL, stop
from megabts.runtime.stage_display import StageDisplay

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Stage:
    """One command of the job."""

    name: str
    title: str
    """What people read."""
    command: list[str]
    done: Path
    """Marker file; exists when the stage is finished."""
    needs: tuple[str, ...] = ()
    """Names of stages, earlier in the list, that must be finished before."""
    metrics: Path | None = None
    """Run folder whose metrics.jsonl tells the progress."""
    total_steps: int = 0
    """Steps that the run of `metrics` will have."""
    log: Path = field(kw_only=True)
    """Gets the command's stdout and stderr, of the latest attempt."""
    exclusive: bool = False
    """Runs with no other stage beside it, and with all threads."""
    makes: Path | None = None
    """File or folder that the command makes and does not overwrite; removed before the command starts."""
    resumes: bool = False
    """The command goes on with a `makes` that it was interrupted at; removed then only if its needs are others."""


@dataclass(frozen=True)
class _Running:
    """A started command."""

    stage: Stage
    process: subprocess.Popen[bytes]
    started: float
    slot: int
    """Its number among those that run, no other's meanwhile."""


def run_stages(stages: Sequence[Stage], *, workers: int, threads: int, gpus: Sequence[str] = ()) -> dict[str, float]:
    """Run the stages, at most `workers` at once; returns each stage's seconds, those of kept stages included.

    `threads` is the machine's: an exclusive stage gets all of them as OMP_NUM_THREADS, the others an equal share. With
    `gpus`, as CUDA_VISIBLE_DEVICES names them, there are as many workers, and each sees one GPU, its own.
    Raises `UserError` when a stage fails, KeyboardInterrupt on Ctrl-C and SystemExit on other signals, each after all
    commands have ended.
    """
    _check(stages)
    workers = len(gpus) or workers
    origins = _origins(stages)
    kept = _kept(stages, origins)
    for stage in stages:
        if stage.name not in kept:
            stage.done.unlink(missing_ok=True)
    seconds = dict(kept)
    running: list[_Running] = []
    with _caught_signals() as caught, StageDisplay(len(stages)) as display:
        for stage in stages:
            if stage.name in kept:
                display.kept(stage.name, stage.title, kept[stage.name])
        try:
            while len(seconds) < len(stages):
                for stage in _startable(stages, seconds, running, workers):
                    _clear(stage, origins[stage.name])
                    slot = min(set(range(workers)) - {item.slot for item in running})
                    settings = {"OMP_NUM_THREADS": str(threads if stage.exclusive else max(1, threads // workers))}
                    if gpus:
                        settings["CUDA_VISIBLE_DEVICES"] = gpus[slot]
                    running.append(_start(stage, slot, settings))
                    display.started(stage.name, stage.title, stage.metrics, stage.total_steps)
                for item in [item for item in running if item.process.poll() is not None]:
                    seconds[item.stage.name] = _finish(item, origins[item.stage.name])
                    running.remove(item)
                    display.finished(item.stage.name, item.stage.title, seconds[item.stage.name])
                display.tick()
                _raise_caught(caught)
                time.sleep(POLL)
        finally:
            stop([item.process for item in running], GRACE)
    return {stage.name: seconds[stage.name] for stage in stages}


def _check(stages: Sequence[Stage]) -> None:
    known: set[str] = set()
    for stage in stages:
        if stage.name in known:
            raise UsageError(f"two stages are named {stage.name!r}")
        for need in stage.needs:
            if need not in known:
                raise UsageError(f"stage {stage.name!r} needs {need!r}, which is no stage before it")
        known.add(stage.name)


def _kept(stages: Sequence[Stage], origins: dict[str, str]) -> dict[str, float]:
    """Seconds of the stages that need not run: marker of this very origin, and all needs kept."""
    kept: dict[str, float] = {}
    for stage in stages:
        marker = _read_marker(stage.done)
        same = marker.get("command") == stage.command
        same = same and marker.get("origin", origins[stage.name]) == origins[stage.name]  # earlier markers have none
        if same and all(need in kept for need in stage.needs):
            kept[stage.name] = float(marker.get("seconds", 0.0))
    return kept


def _read_marker(path: Path) -> dict[str, Any]:
    """The marker's content; empty for one that is missing or damaged, which makes its stage run again."""
    try:
        marker = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _startable(
    stages: Sequence[Stage], finished: Iterable[str], running: Sequence[_Running], workers: int
) -> Iterator[Stage]:
    """Stages to start now, in list order."""
    begun = {*finished, *(item.stage.name for item in running)}
    done = set(finished)
    active = [item.stage for item in running]
    for stage in stages:
        if stage.name in begun or not done.issuperset(stage.needs):
            continue
        if len(active) >= workers or any(other.exclusive for other in active):
            return
        if not (stage.exclusive and active):
            active.append(stage)
            yield stage


def _origins(stages: Sequence[Stage]) -> dict[str, str]:
    """Of each stage: a hash of its command and of its needs' origins."""
    found: dict[str, str] = {}
    for stage in stages:
        parts = [stage.command, [found[need] for need in stage.needs]]
        found[stage.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return found


def _clear(stage: Stage, origin: str) -> None:
    """Remove what an earlier command of the stage made, unless this one goes on with it; note who begins."""
    if stage.makes is None:
        return
    begun = stage.done.with_name(stage.done.name + ".begun")
    if stage.resumes and begun.exists() and begun.read_text() == origin:
        return
    begun.unlink(missing_ok=True)  # first: what is removed by half is nothing to go on with
    if stage.makes.is_dir() and not stage.makes.is_symlink():
        shutil.rmtree(stage.makes)
    else:
        stage.makes.unlink(missing_ok=True)
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(origin)


def _start(stage: Stage, slot: int, settings: dict[str, str]) -> _Running:
    """Start the command, with `settings` in its environment."""
    stage.log.parent.mkdir(parents=True, exist_ok=True)
    # A waiting OpenMP thread spins briefly, then lets go of its core. Spinning longer beside a busy neighbour makes
    # small operations many times slower; not spinning at all costs a third of the speed on an idle machine.
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000", **settings}
    try:
        with stage.log.open("wb") as log:
            process = subprocess.Popen(
                stage.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(f"stage {stage.title} failed: cannot start {stage.command[0]}: {error.strerror}") from None
    return _Running(stage, process, time.monotonic(), slot)


def _finish(item: _Running, origin: str) -> float:
    """Write the marker of a command that ended well and return its seconds; raise `UserError` for any other."""
    stage, code = item.stage, item.process.returncode
    stop([item.process], GRACE)
    if code != 0:
        end = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        reason = _last_line(stage.log).removeprefix("error: ") or end
        raise UserError(f"stage {stage.title} failed: {reason}; log: {stage.log}; run again to continue")
    seconds = round(time.monotonic() - item.started, 3)
    stage.done.parent.mkdir(parents=True, exist_ok=True)
    aside = stage.done.with_name(stage.done.name + ".tmp")
    aside.write_text(json.dumps({"command": stage.command, "origin": origin, "seconds": seconds}) + "\n")
    os.replace(aside, stage.done)
    return seconds


def _last_line(path: Path) -> str:
    """The last line of a log that is not blank."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect the signals that end a job, so that none of them can come between starting and knowing a command.

    Ignored signals (nohup) stay ignored; outside the main thread nothing is collected.
    """
    caught: list[int] = []
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, lambda received, _: caught.append(received))
    try:
        yield caught
    finally:
        for installed, handler in previous.items():
            signal.signal(installed, handler)


def _raise_caught(caught: Sequence[int]) -> None:
    if signal.SIGINT in caught:
        raise KeyboardInterrupt
    if caught:
        raise SystemExit(128 + caught[0])
