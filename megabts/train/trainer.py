"""The training loop: steps, log lines, validation, checkpoints, and an orderly end on a signal."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import torch

from megabts.bts.flops import bts_flops
from megabts.bts.model import BTSModel
from megabts.checkpoint.lock import RunLock
from megabts.checkpoint.manifest import CheckpointError
from megabts.checkpoint.saver import Saved
from megabts.checkpoint.storage import has_steps, resolve
from megabts.errors import UserError
from megabts.evaluation.perplexity import domain_losses
from megabts.merge.routing import Routing
from megabts.model.flops import dense_flops
from megabts.moe.flops import moe_flops
from megabts.moe.model import MoEModel
from megabts.optimizer.schedule import check_schedule
from megabts.optimizer.stability import AdamMonitor, SpikeGuard
from megabts.parallel.collectives import all_reduce, broadcast_object
from megabts.runtime.device import memory, peak_flops, synchronize
from megabts.runtime.metrics import MetricsLogger, StepStats, reported
from megabts.runtime.progress import Progress
from megabts.train.health import adam_health
from megabts.train.routes import watch_routes
from megabts.train.setup import Run
from megabts.train.state import make_saver, restore, start_save
from megabts.train.step import StepResult, train_step

log = logging.getLogger(__name__)

EXIT_REQUEUE = 85
"""Exit code of a run that was told to stop, saved, and wants to be started again."""


class Trainer:
    """Runs one run to its end; `fit` returns the process's exit code."""

    def __init__(self, run: Run, progress: Progress | None = None) -> None:
        self.run = run
        self.progress = progress or Progress()
        self.progress.take_role(f"pp {run.mesh.pp.rank} ep {run.mesh.ep.rank}")
        self.config = run.config
        self.dir = Path(run.config.checkpoint.dir) if run.config.checkpoint.dir else None
        self.guard = SpikeGuard(sigma=run.config.optimizer.skip_sigma)
        self.flops_per_token = _flops_per_token(run)
        self.saver = make_saver(run, self.dir) if self.dir else None
        self.saved_step = -1
        self.metrics_failed = False
        check_schedule(run.config.optimizer, run.config.train.steps)

    def fit(self) -> int:
        """Train from where the run stands to its last step. 0: finished; 85: saved on SIGTERM or SIGUSR1.

        Raises UserError: the run folder is in use or holds another run, or too many steps in a row went bad.
        """
        leads = self.run.mesh.rank == 0
        steps = self.config.train.steps
        with _stop_signals() as stop, RunLock(self.dir) if self.dir and leads else nullcontext():
            first = self._begin(self._checkpoint_to_continue())
            if first >= steps:
                log.info(f"{self.dir} is finished: it has {first} of {steps} steps; nothing to do")
                return 0
            logger = self._logger(first) if leads else None
            try:
                return self._loop(first, logger, stop)
            finally:
                if self.saver is not None and self.run.mesh.world_size == 1:
                    self.saver.wait()  # the run folder is ours until then; other ranks may be gone
                if logger:
                    with self._metrics_may_fail():
                        logger.close()

    def _checkpoint_to_continue(self) -> str:
        """The folder that the first rank found in the run folder, on every rank; "" for a new run."""
        found = ""
        if self.run.mesh.rank == 0 and self.dir is not None and has_steps(self.dir):
            if not self.config.checkpoint.resume:
                raise UserError(
                    f"{self.dir} holds a run already; continue it with --checkpoint.resume true, or give another "
                    "--checkpoint.dir"
                )
            found = str(resolve(self.dir))
        return str(broadcast_object(found))

    def _begin(self, folder: str) -> int:
        """The number of steps done already."""
        if not folder:
            if self.config.checkpoint.resume:
                log.info(f"no checkpoint in {self.dir} to resume from; this run starts at its beginning")
            return 0
        step = self.saved_step = restore(self.run, Path(folder), self.guard)
        log.info(f"resumed from {folder} after step {step}")
        return step

    def _loop(self, first: int, logger: MetricsLogger | None, stop: list[int]) -> int:
        run, steps = self.run, self.config.train.steps
        with closing(run.loader.iterate(first * self.config.train.global_batch)) as batches:
            for step in range(first, steps):
                begin = time.perf_counter()
                self.progress.enter("data", step + 1)
                micro_batches = next(batches)
                data_seconds = time.perf_counter() - begin
                with watch_routes(
                    run, wanted=reported(step + 1, self.config.logging.every, first + 1, steps)
                ) as routes:
                    result = train_step(
                        run.stages, run.optimizer, self.guard, micro_batches, step, self.config, self.progress
                    )
                synchronize(run.device)
                seconds = time.perf_counter() - begin
                extra = self._adam_health(step + 1) | routes
                if logger:
                    stats = self._stats(step + 1, result, seconds, data_seconds, extra)
                    with self._metrics_may_fail():
                        logger.log_step(stats)
                if self._after(step + 1, result, logger, stop):
                    return EXIT_REQUEUE
        return 0

    def _after(self, step: int, result: StepResult, logger: MetricsLogger | None, stop: list[int]) -> bool:
        """Judge, validate and save after `step` steps. Returns whether the run must stop before its end."""
        last = step == self.config.train.steps
        self._judge(step, result)
        self.progress.enter("the end of the step")
        if self._due(step, self.config.train.valid_every):
            self._validate(step, logger)
        stopping = self._agree(stop) and not last
        if stopping or self._due(step, self.config.checkpoint.every):
            self._save(step, must=stopping or last)
        if stopping:
            log.info(f"stopped by a signal after step {step}; start again with --checkpoint.resume true")
        return stopping

    def _due(self, step: int, every: int) -> bool:
        """Whether something done `every` steps and at the end (0: only there; -1: never) is due after `step`."""
        return every >= 0 and (step == self.config.train.steps or (every > 0 and step % every == 0))

    def _agree(self, stop: list[int]) -> bool:
        """Whether any rank was signalled: all stop after the same step. A save whose phase all have done goes on."""
        busy = self.saver is not None and self.saver.busy
        flags = torch.tensor([float(bool(stop)), float(busy)], device=self.run.device)
        told, writing = all_reduce(flags, self.run.mesh.world).tolist()
        if self.saver is not None and not writing:
            self._report(self.saver.advance())
        return bool(told)

    def _judge(self, step: int, result: StepResult) -> None:
        """Report a skipped step; raise UserError after too many in a row."""
        if not result.skipped:
            return
        log.warning(f"step {step} skipped: {result.skipped}; parameters unchanged")
        if self.guard.exhausted:
            self._finish_save()
            raise UserError(
                f"{self.guard.limit} bad steps in a row up to step {step} ({result.skipped}); {self._last_good()}; "
                "lower optimizer.lr or look at the data"
            )

    def _last_good(self) -> str:
        return f"last good: step {self.saved_step}" if self.saved_step > 0 else "nothing was saved yet"

    def _validate(self, step: int, logger: MetricsLogger | None) -> None:
        run, train = self.run, self.config.train
        if not run.valid:
            return
        self.progress.enter("validation", timed=False)
        run.model.train(False)
        found = domain_losses(
            lambda batch: run.stages.total(run.stages.losses([batch], backward=False)).sum(),
            run.valid,
            model=self.config.model,
            micro_batch=train.micro_batch,
            dp=run.mesh.dp,
            device=run.device,
            eod_id=run.eod_id,
            eod_mask_loss=self.config.data.eod_mask_loss,
        )
        run.model.train()
        if logger:
            losses = {domain: result.loss for domain, result in found.items()}
            with self._metrics_may_fail():
                logger.log_valid(step, losses, step * train.global_batch)

    @contextmanager
    def _metrics_may_fail(self) -> Iterator[None]:
        """A disk that takes no metrics does not end the training; it is said once."""
        try:
            yield
        except OSError as error:
            if not self.metrics_failed:
                log.warning(f"metrics not written: {error.strerror or error}; training continues")
            self.metrics_failed = True

    def _save(self, step: int, *, must: bool) -> None:
        """Start a save, when one under way has ended; wait for it if it `must` succeed, or if that is asked for."""
        if self.saver is None:
            return
        self._finish_save()
        self.progress.enter("the save", timed=False)
        start_save(self.saver, self.run, step, self.guard)
        if must or not self.config.checkpoint.asynchronous:
            self._finish_save(must=must)

    def _finish_save(self, *, must: bool = False) -> None:
        """Wait, on every rank, for the end of the save under way, if there is one."""
        if self.saver is not None and self.saver.in_flight:
            self.progress.enter("the save", timed=False)
            self._report(self.saver.wait(), must=must)

    def _report(self, saved: Saved | None, *, must: bool = False) -> None:
        """Say how a save ended; a failure is a warning, unless the save `must` succeed."""
        if saved is None:
            return
        if not saved.problem:
            self.saved_step = saved.step
            log.info(f"saved {saved.folder}")
        elif must or self.config.checkpoint.save_fail == "stop":
            raise CheckpointError(f"{saved.problem}; {self._last_good()}")
        else:
            log.warning(f"{saved.problem}; training continues, {self._last_good()}")

    def _logger(self, first: int) -> MetricsLogger:
        run, logging_config = self.run, self.config.logging
        return MetricsLogger(
            self.dir,
            tensorboard=logging_config.tensorboard,
            every=logging_config.every,
            world_size=run.mesh.world_size,
            peak_flops=peak_flops(run.device, run.model.dtype),
            progress=logging_config.progress,
            total_steps=self.config.train.steps,
            start_step=first,
            device="gpu" if run.device.type == "cuda" else "rank",
        )

    def _stats(
        self, step: int, result: StepResult, seconds: float, data_seconds: float, extra: dict[str, float]
    ) -> StepStats:
        used, total = memory(self.run.device)
        tokens = self.config.train.global_batch * self.config.data.seq_length
        return StepStats(
            step=step,
            steps=self.config.train.steps,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens=tokens,
            seconds=seconds,
            flops=tokens * self.flops_per_token,
            consumed_samples=step * self.config.train.global_batch,
            memory_bytes=used,
            memory_total_bytes=total,
            data_seconds=data_seconds,
            skipped_steps=self.guard.skipped,
            extra=extra,
        )

    def _adam_health(self, step: int) -> dict[str, float]:
        every, updates = self.config.logging.adam_every, step - self.guard.skipped
        if every == 0 or step % every or updates == 0:
            return {}
        settings = self.config.optimizer
        monitor = AdamMonitor(settings.beta1, settings.beta2, settings.eps)
        return adam_health(self.run.optimizer, monitor, updates)


def _flops_per_token(run: Run) -> float:
    config = run.config
    if isinstance(run.model, BTSModel):
        return bts_flops(config.model, config.bts, config.data.seq_length, run.model.plan).total
    if isinstance(run.model, MoEModel):
        return moe_flops(config.model, config.moe, config.data.seq_length).total
    dense = dense_flops(config.model, config.data.seq_length)
    if isinstance(run.model, Routing):  # every member judges every sequence
        return run.model.num_local_members * dense.forward
    return dense.total


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Inside the block SIGTERM and SIGUSR1 are noted in the list, to be honoured between steps."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
