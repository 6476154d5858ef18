"""Where a round's time goes: one round of a contestant under torch's profiler, as a table to read.

It is a round of its own, in the contestant's process, after those that were timed: the profiler slows what it watches,
by a tenth to several times where operators are small. So its shares are to be read, not its seconds.
"""

import time
from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, supported_activities

ROWS = 40
"""Of the table: operators and kernels, those with most time of their own first."""
NAME_WIDTH = 100
"""Characters of a kernel's name."""


def write_profile(run: Callable[[], object], path: Path) -> float:
    """Profile one round into a text file; its seconds. Raises OSError where the file cannot be written.

    Rows are sorted by their own time on the GPU where it did something, else on the CPU; the totals stand below.
    """
    with profile(activities=supported_activities()) as watched:
        start = time.perf_counter()
        run()
        taken = time.perf_counter() - start
    events = watched.key_averages()
    on_gpu = any(event.self_device_time_total > 0 for event in events)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = events.table(order, ROWS, max_name_column_width=NAME_WIDTH)
    path.write_text(f"{path.stem}: one round, {taken:.4g} s under the profiler\n{table}", encoding="utf-8")
    return taken
