"""Real ranks on one machine: processes that talk through gloo and meet at a file, not a port.

`run_ranks(4, work, *args)` calls `work(rank, *args)` in four processes and returns their four results. `work` must be a
function at the top of a module; starting ranks costs a second or two, so one `work` does well to answer many cases.
Processes are forked from a server that has only imported what they need, which is fast and free of the test run's
threads.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

import megabts
from megabts.runtime.cores import num_cores

PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest", "megabts.train.trainer"]
"""Imported once, for all ranks: the first optimizer alone imports `torch._dynamo`, for seconds."""


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message names it and holds its traceback."""


def run_ranks(num_ranks: int, work: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """`work(rank, *args)` on `num_ranks` gloo ranks; the results by rank.

    Raises RankError for the first rank that raises or dies, or when `timeout` seconds are over; all ranks are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as folder:
        ours, processes = {}, []
        for rank in range(num_ranks):
            mine, theirs = context.Pipe()
            whole = (theirs, Path(folder) / "meet", rank, num_ranks, timeout, work, args)
            process = context.Process(target=_run_rank, args=whole, daemon=True)
            process.start()
            theirs.close()
            ours[mine] = rank
            processes.append(process)
        try:
            return _collect(ours, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run_rank(
    pipe: Connection,
    meet: Path,
    rank: int,
    num_ranks: int,
    timeout: float,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(max(1, num_cores() // num_ranks))
    try:
        assert Path(megabts.__file__).parents[1] == Path(__file__).parents[1], "ranks import another copy of megabts"
        dist.init_process_group(
            "gloo", f"file://{meet}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout)
        )
        pipe.send((True, work(rank, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.recv()  # until the test ends this rank: its sockets, and the memory of tensors it sent, stay till then


def _collect(ours: dict[Any, int], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ours):
        waiting = [pipe for pipe, rank in ours.items() if rank not in results]
        ready = wait(waiting, deadline - time.monotonic())
        if not ready:
            raise RankError(f"ranks {[ours[pipe] for pipe in waiting]} did not finish in time")
        errors = []
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                good, result = pipe.recv()
            except EOFError:  # told before what the others say: they fail because this one is gone
                raise RankError(f"rank {ours[pipe]} died") from None
            if good:
                results[ours[pipe]] = result
            else:
                errors.append(f"rank {ours[pipe]}: {result}")
        if errors:
            raise RankError(errors[0])
    return [results[rank] for rank in sorted(results)]
