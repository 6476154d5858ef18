"""Shows the stages of a job: bars on a terminal, lines elsewhere.

Progress inside a stage is the last step in its run's metrics.jsonl over the steps it will have; a stage without one
shows that it is running and for how long. On a terminal nothing else is printed; elsewhere there is a line when a
stage starts and ends, and one about all running stages every `QUIET` seconds.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megabts.runtime.metrics import FILE_NAME

QUIET = 30.0
"""Seconds between lines about running stages."""
REFRESH = 0.5
"""Seconds between looks at the metrics files."""
CLOCK_SLACK = 1.0
"""Seconds by which a file just written may seem older than its stage: clocks differ and file times are coarse."""


@dataclass
class _Shown:
    """A running stage as displayed."""

    title: str
    metrics: Path | None
    total_steps: int
    since: float
    task: TaskID | None
    steps: int = 0


class StageDisplay:
    """Context manager around a job of `num_stages` stages; its methods report what happens to them."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.num_finished = 0
        self.running: dict[str, _Shown] = {}
        self.next_look = 0.0
        self.next_line = time.monotonic() + QUIET
        self.bars: Progress | None = None
        self.overall: TaskID | None = None
        if sys.stdout.isatty():
            self.bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )

    def __enter__(self) -> "StageDisplay":
        if self.bars is not None:
            self.overall = self.bars.add_task("all stages", total=self.num_stages)
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def kept(self, name: str, title: str, seconds: float) -> None:
        """A stage was finished by an earlier run, in `seconds`."""
        if self.bars is not None:
            self.bars.add_task(f"{title} (kept)", total=1, completed=1)
        self._ended(f"{title}: kept ({seconds:.1f} s)")

    def started(self, name: str, title: str, metrics: Path | None, total_steps: int) -> None:
        """A stage's command has been started."""
        measured = metrics is not None and total_steps > 0
        task = None
        if self.bars is not None:
            task = self.bars.add_task(title, total=total_steps if measured else None)
        else:
            print(f"{title}: started", flush=True)
        since = time.time() - CLOCK_SLACK
        self.running[name] = _Shown(title, metrics if measured else None, total_steps, since, task)

    def finished(self, name: str, title: str, seconds: float) -> None:
        """A stage's command has ended well after `seconds`."""
        shown = self.running.pop(name)
        if self.bars is not None and shown.task is not None:
            total = shown.total_steps or 1
            self.bars.update(shown.task, total=total, completed=total)
            self.bars.stop_task(shown.task)
        self._ended(f"{title}: done ({seconds:.1f} s)")

    def tick(self) -> None:
        """Bring the display up to date; cheap enough for a polling loop."""
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + REFRESH
        for shown in self.running.values():
            if shown.metrics is not None:
                shown.steps = max(shown.steps, last_step(shown.metrics / FILE_NAME, shown.since))
            if self.bars is not None and shown.task is not None:
                self.bars.update(shown.task, completed=shown.steps)
        if self.bars is None and self.running and now >= self.next_line:
            self.next_line = now + QUIET
            print("running: " + "; ".join(self._state(shown) for shown in self.running.values()), flush=True)

    def _state(self, shown: _Shown) -> str:
        seconds = time.time() - shown.since - CLOCK_SLACK
        steps = f", step {shown.steps}/{shown.total_steps}" if shown.metrics is not None else ""
        return f"{shown.title} ({seconds:.0f} s{steps})"

    def _ended(self, line: str) -> None:
        self.num_finished += 1
        if self.bars is not None and self.overall is not None:
            self.bars.update(self.overall, completed=self.num_finished)
        else:
            print(f"[{self.num_finished}/{self.num_stages}] {line}", flush=True)


def last_step(path: Path, since: float = 0.0) -> int:
    """The last step in a metrics.jsonl that is being written; 0 for none yet or a file older than time `since`."""
    try:
        status = path.stat()
        if status.st_mtime < since:
            return 0
        with path.open("rb") as file:
            file.seek(max(0, status.st_size - 16_384))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
