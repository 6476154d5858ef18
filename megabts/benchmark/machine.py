"""What a benchmark ran on, and whether it had the machine for itself."""

import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

BUSY_CORES = 0.2
"""Cores in use by others from which timings are void. An idle machine shows up to 0.1: clock ticks, daemons."""

_ROOT = Path(__file__).resolve().parents[2]


def cores_used_by_others(seconds: float = 1.0) -> float:
    """Cores kept busy during the next `seconds` by anything but this process: 0.0 when idle, 2.0 for two busy ones.

    Time that a hypervisor gave to other machines counts, waiting for a disk does not. The caller does nothing
    meanwhile and has no running children. 0.0 where there is no /proc/stat (it exists on Linux only).
    """
    if not Path("/proc/stat").exists():
        return 0.0
    start, before, own_before = time.monotonic(), _busy_seconds(), _own_seconds()
    time.sleep(seconds)
    own, busy = _own_seconds() - own_before, _busy_seconds() - before
    return max(0.0, busy - own) / (time.monotonic() - start)


def _busy_seconds() -> float:
    """CPU seconds of all cores since the machine started: user, nice, system, interrupts and stolen ones."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process, its threads, and children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_bytes() -> int:
    """Most memory this process had at one time.

    Linux's ru_maxrss does not forget the process that started this one; /proc does.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def describe_machine() -> dict[str, object]:
    """Cores, processor, memory, versions, the code's commit and the first GPU, for a header and for JSON."""
    import torch

    from megabts.runtime.cores import num_cores
    from megabts.runtime.device import gpu_model, gpu_names

    return {
        "cores": num_cores(),
        "cpu": _processor(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        **({"gpu": gpu_model(torch.device("cuda", 0))} if gpu_names() else {}),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    """The short hash of the commit that is checked out, with "+" when files were changed; "" without git."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changes else "")
