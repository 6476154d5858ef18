"""What a run reports, and where: log lines or a progress bar, metrics.jsonl, TensorBoard.

`metrics.jsonl` in the run folder has one JSON object a line, flushed line by line: training steps
{"step", "loss", "lr", "grad_norm", "tokens", "seconds", "flops", "consumed_samples", "memory_bytes", "data_seconds",
"skipped_steps", and extra figures by name} and validations {"step", "consumed_samples", "valid": {domain: loss}}.
Losses are in nats per token, printed so that reading them back gives the same float; null stands for a figure that is
not finite. A resumed run first drops the lines past its checkpoint, so the file is always one curve.

TensorBoard gets Megatron-LM's tag names, so that its users' dashboards work, and expert_loss/<domain>.
Make the logger on rank 0 alone.
"""

import json
import logging
import math
import os
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megabts.errors import UserError

LOGGER = logging.getLogger(__name__)
FILE_NAME = "metrics.jsonl"
WINDOW = 20
"""Steps over which throughput is averaged."""


@dataclass
class StepStats:
    """One finished training step, over all ranks unless said otherwise."""

    step: int
    """Finished steps, this one included."""
    steps: int
    """Steps of the whole run."""
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    """Wall time of this step, data included."""
    flops: float
    """Model FLOPs of this step."""
    consumed_samples: int
    """Samples since the run began."""
    memory_bytes: int = 0
    """Peak memory of this rank."""
    memory_total_bytes: int = 0
    """Memory of this rank's device; 0 when unknown."""
    data_seconds: float = 0.0
    """Part of `seconds` spent waiting for data."""
    skipped_steps: int = 0
    """Steps skipped since the run began."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further figures by name, reported under that name. Log lines show those of `SHOWN` alone."""


SHOWN = {
    "moe/entropy": "router entropy {:.3f}",
    "moe/dead": "dead ffn experts {:.0f}",
    "moe/attention_entropy": "attention router entropy {:.3f}",
    "moe/attention_dead": "dead attention experts {:.0f}",
}
"""Further figures that log lines have room for."""


def reported(step: int, every: int, first: int, last: int) -> bool:
    """Whether a run whose steps are `first` to `last` reports `step`, at one report in `every` steps."""
    return step % every == 0 or step in (first, last)


class MetricsLogger:
    """Reports steps and validations to every writer the run asked for.

    `start_step` is the number of steps the resumed checkpoint holds (0: a new run). `every` is the number of steps
    between reports; the first and the last step are always reported. `peak_flops` is one rank's peak in FLOP/s, None
    when unknown. `device` is the word that throughput is given per.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        tensorboard: bool,
        every: int,
        world_size: int,
        peak_flops: float | None,
        progress: bool,
        total_steps: int,
        start_step: int = 0,
        device: str = "gpu",
    ) -> None:
        self.every = max(1, every)
        self.first_step = start_step + 1
        self.total_steps = total_steps
        self.rates = Rates(world_size, peak_flops, device)
        self.lines_every = self.every
        self.bar: _Bar | None = None
        if progress and sys.stdout.isatty():
            self.bar = _Bar(start_step, total_steps)
        elif progress:
            self.lines_every = max(1, total_steps // 10)
        self.jsonl: _JsonLines | None = None
        self.board: _TensorBoard | None = None
        if run_dir is not None:
            self.jsonl = _JsonLines(run_dir / FILE_NAME, start_step)
        if run_dir is not None and tensorboard:
            self.board = _TensorBoard(run_dir, start_step)

    def log_step(self, stats: StepStats) -> None:
        """Report one training step; call it after every step, so that averages see all of them."""
        self.rates.add(stats)
        if self.bar is not None:
            self.bar.update(stats, self.rates)
        elif self._due(stats.step, self.lines_every):
            LOGGER.info(self.rates.line(stats))
        if not self._due(stats.step, self.every):
            return
        if self.jsonl is not None:
            self.jsonl.write(step_record(stats))
        if self.board is not None:
            self.board.step(stats, self.rates)

    def log_valid(self, step: int, losses: Mapping[str, float], consumed_samples: int) -> None:
        """Report validation losses per domain, in nats per token, after `step` finished steps."""
        parts = " | ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
        LOGGER.info(f"valid at step {step} | {parts}")
        if self.jsonl is not None:
            self.jsonl.write({"step": step, "consumed_samples": consumed_samples, "valid": dict(losses)})
        if self.board is not None:
            self.board.valid(step, losses)

    def close(self) -> None:
        """End the progress bar and close the files."""
        writers: tuple[_Bar | _JsonLines | _TensorBoard | None, ...] = (self.bar, self.jsonl, self.board)
        for writer in writers:
            if writer is not None:
                writer.close()

    def _due(self, step: int, every: int) -> bool:
        return reported(step, every, self.first_step, self.total_steps)


class Rates:
    """Throughput over the last steps, and the log line made of it.

    The first step of a process (allocation, compilation) counts only as long as there is no other.
    """

    def __init__(self, world_size: int, peak_flops: float | None, device: str = "gpu") -> None:
        self.world_size = world_size
        self.peak_flops = peak_flops
        self.device = device
        self.window: deque[StepStats] = deque(maxlen=WINDOW)
        self.started = False
        self.batch: int | None = None
        """Samples of the last step; None after a resumed run's first, whose start is not known here."""

    def add(self, stats: StepStats) -> None:
        """Take in one step."""
        before = self.window[-1].consumed_samples if self.window else 0
        self.batch = stats.consumed_samples - before if self.window or stats.step == 1 else None
        if self.window and not self.started:
            self.window.clear()
            self.started = True
        self.window.append(stats)

    @property
    def seconds(self) -> float:
        """Wall time of the steps looked back on."""
        return max(sum(stats.seconds for stats in self.window), 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return sum(stats.tokens for stats in self.window) / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s of one rank."""
        return sum(stats.flops for stats in self.window) / self.seconds / self.world_size

    def eta(self, stats: StepStats) -> str:
        """Time left as hh:mm:ss; unknown after the first step."""
        if stats.step >= stats.steps:
            return "00:00:00"
        if not self.started:
            return "--:--:--"
        left = round((stats.steps - stats.step) * self.seconds / len(self.window))
        return f"{left // 3600:02d}:{left // 60 % 60:02d}:{left % 60:02d}"

    def line(self, stats: StepStats) -> str:
        """The log line of one step."""
        speed, flops = self.tokens_per_second, self.flops_per_second
        per_rank = f" ({_thousands(speed / self.world_size)}/{self.device})" if self.world_size > 1 else ""
        work = f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"
        mfu = f"{100 * flops / self.peak_flops:.1f}%" if self.peak_flops else "N/A"
        parts = [
            f"step {stats.step}/{stats.steps}",
            f"loss {stats.loss:.4f}",
            f"lr {stats.lr:.1e}",
            f"gnorm {stats.grad_norm:.2f}",
            f"tok/s {_thousands(speed)}{per_rank}",
            f"{work}/{self.device}",
            f"MFU {mfu}",
            f"mem {_memory(stats)}",
            f"data {100 * sum(s.data_seconds for s in self.window) / self.seconds:.1f}%",
            f"eta {self.eta(stats)}",
        ]
        parts += [words.format(stats.extra[name]) for name, words in SHOWN.items() if name in stats.extra]
        if stats.skipped_steps:
            parts.append(f"skipped {stats.skipped_steps}")
        return " | ".join(parts)


def step_record(stats: StepStats) -> dict[str, Any]:
    """The step's object in metrics.jsonl."""
    omitted = ("steps", "memory_total_bytes", "extra")
    return {name: value for name, value in vars(stats).items() if name not in omitted} | stats.extra


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training steps and validations of a run, each in step order, as written in its metrics.jsonl.

    A validation done twice at one step counts once, the later one. A damaged last line (a run killed while writing
    it) is passed over; raises `UserError` for a missing file and for damage elsewhere.
    """
    rows = _read_rows(run_dir / FILE_NAME)
    steps = {row["step"]: row for row in rows if "valid" not in row}
    valid = {row["step"]: row for row in rows if "valid" in row}
    return [steps[step] for step in sorted(steps)], [valid[step] for step in sorted(valid)]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); is this a run folder?") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, object_hook=_numbers)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is damaged; remove that line") from None
        rows.append(row)
    return rows


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The object with NaN where it has null."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def _finite(value: Any) -> Any:
    """The value with None for floats that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _thousands(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _memory(stats: StepStats) -> str:
    used = f"{stats.memory_bytes / 2**30:.1f}"
    return f"{used}/{stats.memory_total_bytes / 2**30:.0f} GiB" if stats.memory_total_bytes else f"{used} GiB"


class _JsonLines:
    """Appends objects to metrics.jsonl; a new run starts it anew, a resumed one keeps the lines up to its step."""

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in _read_rows(path) if row["step"] <= start_step] if start_step and path.exists() else []
        aside = path.with_suffix(".jsonl.tmp")
        aside.write_text("".join(self._line(row) for row in kept))
        os.replace(aside, path)
        self.file = path.open("a")

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        return json.dumps(_finite(row), allow_nan=False) + "\n"

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(self._line(row))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    """Event files in the run folder's `tensorboard`; a resumed run purges the events past its step.

    Purging goes by an event's step, which for 'lm loss vs samples' is a number of samples and so always past it; that
    curve is written again from metrics.jsonl.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # heavy

        purge_step = start_step + 1 if start_step else 0
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        for row in read_metrics(run_dir)[0] if start_step else []:
            self.writer.add_scalar("lm loss vs samples", row["loss"], row["consumed_samples"])

    def step(self, stats: StepStats, rates: Rates) -> None:
        scalars = {
            "lm loss": stats.loss,
            "learning-rate": stats.lr,
            "grad-norm": stats.grad_norm,
            "throughput": rates.flops_per_second / 1e12,
            "iteration-time": stats.seconds,
            "mem-reserved-bytes": stats.memory_bytes,
            **stats.extra,
        }
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, stats.step)
        self.writer.add_scalar("lm loss vs samples", stats.loss, stats.consumed_samples)
        if rates.batch is not None:
            self.writer.add_scalar("batch-size", rates.batch, stats.step)

    def valid(self, step: int, losses: Mapping[str, float]) -> None:
        for domain, loss in losses.items():
            self.writer.add_scalar(f"expert_loss/{domain}", loss, step)
        if losses:
            mean = sum(losses.values()) / len(losses)
            self.writer.add_scalar("lm loss validation", mean, step)
            self.writer.add_scalar("lm loss validation ppl", math.exp(min(mean, 700.0)), step)

    def close(self) -> None:
        self.writer.close()


class _Bar:
    """A progress bar in place of log lines."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        self.progress = Progress(*columns, TimeRemainingColumn())
        self.task: TaskID = self.progress.add_task("", total=total_steps, completed=start_step, figures="")
        self.progress.start()

    def update(self, stats: StepStats, rates: Rates) -> None:
        figures = f"loss {stats.loss:.4f} | tok/s {_thousands(rates.tokens_per_second)} | left"
        self.progress.update(self.task, completed=stats.step, figures=figures)

    def close(self) -> None:
        self.progress.stop()
