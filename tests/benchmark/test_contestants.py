"""Rounds in other processes: their times and memory, their errors, and that none is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megabts.benchmark.contestants import Contestant, Round
from megabts.benchmark.suite import Settings
from megabts.benchmark.timing import interleaved
from megabts.errors import UserError

MIB = 2**20


def sleeper(seconds: float, own: float | None = None) -> Round:
    def run() -> float | None:
        time.sleep(seconds)
        return own

    return run


def filler(size: int) -> Round:
    """A round takes `size` bytes and gives them back."""

    def run() -> None:
        np.ones(size, np.int8)

    return run


def failing(error: Exception, at_once: bool) -> Round:
    def run() -> None:
        raise error

    if at_once:
        run()
    return run


def dying(code: int) -> Round:
    return lambda: os._exit(code)


def gone(pid: int) -> bool:
    """Whether a process has ended, or does so within ten seconds."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.1)
    return False


def test_rounds_are_timed_where_they_run_and_memory_is_its_own() -> None:
    mine = np.ones(300 * MIB, np.int8)  # the parent's, which its children must not be charged for
    with Contestant(partial(sleeper, 0.05)) as clock, Contestant(partial(filler, 100 * MIB)) as hungry:
        seconds = interleaved({"clock": clock.run, "hungry": hungry.run}, 2)
        assert all(0.05 <= taken < 0.5 for taken in seconds["clock"])
        peaks = clock.peak_bytes(), hungry.peak_bytes()
        pids = [one._process.pid or 0 for one in (clock, hungry)]
    assert peaks[0] < mine.nbytes
    assert 95 * MIB < peaks[1] - peaks[0] < 150 * MIB
    assert all(map(gone, pids))
    with Contestant(partial(sleeper, 0.0, 7.5)) as own:
        assert interleaved({"own": own.run}, 1)["own"] == [7.5]


def multiplier() -> Round:
    """Three matrix products a round."""
    matrix = torch.ones(64, 64)

    def run() -> None:
        for _ in range(3):
            torch.mm(matrix, matrix)

    return run


def test_a_round_is_profiled_where_it_runs(tmp_path: Path) -> None:
    said: list[str] = []
    with Contestant(multiplier) as one:
        one.profile(Settings(progress=said.append), "no folder, no profile")
        assert said == []
        assert one.run() > 0
        one.profile(Settings(progress=said.append, profile=tmp_path), "S.fp32.products")
        assert one.run() > 0
        with pytest.raises(UserError, match=r"^multiplier: FileNotFoundError: .*products\.txt'$"):
            one.profile(Settings(profile=tmp_path / "gone"), "products")
    assert [path.name for path in tmp_path.iterdir()] == ["S.fp32.products.txt"]
    assert said == [f"profile: {tmp_path / 'S.fp32.products.txt'}"]
    lines = (tmp_path / "S.fp32.products.txt").read_text().splitlines()
    assert lines[0].startswith("S.fp32.products: one round, ")
    (row,) = [line for line in lines if "aten::mm " in line]
    assert row.split()[-1] == "3"
    assert any(line.startswith("Self CPU time total: ") for line in lines)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (partial(failing, UserError("no such shape; use S or M"), True), "failing: no such shape; use S or M"),
        (partial(failing, RuntimeError("two\nlines"), False), "failing: RuntimeError: two"),
        (partial(failing, EOFError("a short file"), False), "failing: EOFError: a short file"),
        (partial(dying, 3), r"dying: its process is gone \(exit code 3\); is there enough memory\?"),
    ],
)
def test_an_error_is_one_line_and_ends_the_process(make: Callable[[], Round], line: str) -> None:
    def work() -> None:
        with Contestant(make) as contestant:
            pids.append(contestant._process.pid or 0)
            contestant.run()

    pids: list[int] = []
    with pytest.raises(UserError, match=f"^{line}$"):
        work()
    assert all(map(gone, pids))


PARENT = """
from functools import partial
from megabts.benchmark.contestants import Contestant
from tests.benchmark.test_contestants import sleeper

if __name__ == "__main__":
    with Contestant(partial(sleeper, 1.0)) as one:
        print(one._process.pid, flush=True)
        while True:
            one.run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_none_outlives_an_interrupt_or_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, start_new_session=True
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)  # as a terminal does: to all of them
    else:
        parent.kill()
    _, errors = parent.communicate(timeout=30)
    assert gone(pid)
    if number == signal.SIGINT:
        assert errors.decode().count("Traceback") == 1  # the parent's: the child says nothing
