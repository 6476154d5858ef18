"""What every test shares: hypothesis without deadlines, which would measure the machine's load and not the code; a
core of its own for each of several workers (pytest-xdist), which the ranks that a test starts inherit; and tools,
called in this process."""

import os
import signal

import pytest
from hypothesis import settings

from tests.tools import RunTool, tool_runner

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


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunTool:
    """Runs a tool in this process, see `tests.tools`."""
    return tool_runner(monkeypatch, capsys)
