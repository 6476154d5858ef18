"""What every test shares: hypothesis without deadlines, which would measure the machine's load and not the code; and a
core of its own for each of several workers (pytest-xdist), which the ranks that a test starts inherit."""

import os
import signal

from hypothesis import settings

settings.register_profile("megabts", deadline=None, print_blob=True)
settings.load_profile("megabts")


def pytest_configure() -> None:
    """Let Ctrl-C and a hang-up reach the processes that tests start: a background job and `nohup` ignore them, and so
    would they. A handler here is the default there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
