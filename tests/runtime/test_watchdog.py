"""Who hangs, who is slow, who did not come: judgements on simulated ranks, and meetings of real processes."""

import dataclasses
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megabts.errors import UsageError
from megabts.runtime.device import Launch
from megabts.runtime.progress import Progress, Sampler, is_waiting, where
from megabts.runtime.rendezvous import Identity, meet
from megabts.runtime.verdict import PATIENCE, Beat, StragglerWatch, find_hang

ROOT = Path(__file__).resolve().parents[2]
WAITS = Beat(9, 17, 2, "the gradient sum", True, "a.py:1 f", 12.0, 0.0, 0.0, True, "")
WORKS = dataclasses.replace(WAITS, moves=1, phase="forward", waiting=False)


def judge(now: list[Beat | None], stopped: tuple[int, ...] = ()) -> tuple[int, bool] | None:
    """Rank and silence of the verdict with a time-out of 10 s; the counts of ranks not `stopped` grew since before."""
    before = [beat and dataclasses.replace(beat, count=beat.count - (r not in stopped)) for r, beat in enumerate(now)]
    verdict = find_hang(before, now, 10, slack=1)
    return (verdict.rank, verdict.silent) if verdict else None


def test_the_rank_that_does_not_wait_hangs() -> None:
    assert judge([WAITS, WAITS, WORKS, WAITS]) == (2, False)


def test_a_silent_rank_comes_first() -> None:
    assert judge([WAITS, WORKS, WAITS, WAITS], stopped=(3,)) == (3, True)
    assert judge([WAITS, None, WORKS]) == (1, True)


def test_where_all_wait_it_is_the_least_far() -> None:
    behind = dataclasses.replace(WAITS, step=16, moves=9)
    assert judge([WAITS, dataclasses.replace(WAITS, moves=1), behind]) == (2, False)


def test_a_rank_that_moves_means_no_hang() -> None:
    assert judge([WAITS, dataclasses.replace(WORKS, idle=3.0), WAITS]) is None
    assert judge([WAITS, dataclasses.replace(WORKS, idle=3.0), WAITS], stopped=(0,)) is None


def test_where_none_waits_all_may_be_busy() -> None:
    assert judge([WORKS, WORKS]) is None
    long = dataclasses.replace(WORKS, idle=PATIENCE * 10.0)
    assert judge([long, dataclasses.replace(long, moves=0)]) == (1, False)


def test_long_work_of_one_rank_alone_gets_more_time() -> None:
    """The start, the first step, validation, saves. Not where the process itself is stopped."""
    saves = dataclasses.replace(WORKS, phase="the save", timed=False)
    assert judge([saves, WAITS]) is None
    assert judge([dataclasses.replace(saves, waiting=True), WAITS]) is None
    assert judge([dataclasses.replace(saves, idle=PATIENCE * 10.0), WAITS]) == (0, False)
    assert judge([saves, WAITS], stopped=(0,)) == (0, True)


def test_nothing_is_timed_in_the_first_step_of_a_run() -> None:
    progress = Progress()
    assert not progress.stand.timed
    progress.enter("data", 41)
    progress.enter("forward")
    assert not progress.stand.timed
    progress.enter("data", 42)
    assert progress.stand.timed
    progress.enter("the save", timed=False)
    assert not progress.stand.timed
    assert (progress.stand.step, progress.stand.moves) == (42, 1)


def test_a_rank_that_is_done_is_not_blamed() -> None:
    done = dataclasses.replace(WAITS, phase="done", step=20, idle=1.0)
    assert judge([done, WORKS], stopped=(0,)) == (1, False)


def simulate(watch: StragglerWatch, compute: np.ndarray, roles: list[str] | None = None) -> list[tuple[int, int]]:
    """Feed the watch [steps, ranks] compute seconds of steps that end together; (step, rank) of what it names."""
    named, busy, wall = [], np.zeros(compute.shape[1]), 0.0
    for step, seconds in enumerate(compute, 1):
        busy, wall = busy + seconds, wall + seconds.max() + 0.01
        beats = [
            dataclasses.replace(WAITS, step=step, busy=b, wall=wall, role=roles[r] if roles else "")
            for r, b in enumerate(busy)
        ]
        if found := watch.look(beats):
            named.append((step, found.rank))
    return named


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_no_false_alarm_on_a_busy_machine(num_ranks: int) -> None:
    """20 runs of 500 steps: log-normal noise of 30 %, and in one of 50 steps a rank is held up for five steps' time."""
    rng = np.random.RandomState(num_ranks)
    for _ in range(20):
        compute = 0.2 * rng.lognormal(0, 0.3, (500, num_ranks))
        compute[rng.rand(500, num_ranks) < 0.02 / num_ranks] += 1.0
        assert simulate(StragglerWatch(), compute) == []


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_slow_rank_is_named_within_20_steps_and_seldom_again(num_ranks: int) -> None:
    rng = np.random.RandomState(num_ranks)
    compute = 0.2 * rng.lognormal(0, 0.2, (250, num_ranks))
    compute[:, 1] *= 3
    named = simulate(StragglerWatch(), compute)
    steps = [step for step, _ in named]
    assert {rank for _, rank in named} == {1}
    assert steps[0] <= 20
    assert len(steps) == 3
    assert all(later - former >= 100 for former, later in pairwise(steps))


def test_only_ranks_of_one_role_are_compared() -> None:
    compute = np.tile([0.6, 0.2, 0.2, 0.6], (60, 1))
    assert simulate(StragglerWatch(), compute, ["hub", "expert", "expert", "hub"]) == []
    assert simulate(StragglerWatch(), compute, ["hub", "expert", "expert", "expert"])[0][1] == 3


@pytest.mark.alone
def test_a_sampler_tells_work_from_waiting() -> None:
    """A call of a C `wait` leaves no frame: it is known by the line it stands in."""
    progress = Progress()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    sampler = Sampler(progress)
    progress.enter("forward", 1)
    progress.enter("forward", 2)
    sampler.sample()
    assert not is_waiting()
    thread = threading.Thread(target=lambda: other.wait(["key"]))
    thread.start()
    try:
        busy, wall = sampler.busy, sampler.wall
        time.sleep(0.05)
        assert is_waiting()
        sampler.sample()
        assert sampler.busy == busy
        assert sampler.wall >= wall + 0.05
    finally:
        store.set("key", "")
        thread.join()
    seen: list[str] = []
    looker = threading.Thread(target=lambda: seen.append(where()))
    looker.start()
    looker.join()
    assert seen[0].startswith("tests/runtime/test_watchdog.py:")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


MEET = """
import sys
from megabts.errors import run_tool
from megabts.runtime.device import Launch
from megabts.runtime.failure import told_once
from megabts.runtime.rendezvous import meet

def main():
    with told_once():
        meeting = meet(Launch.from_environment(), 3)
        print("met", len(meeting.ranks), flush=True)
        if meeting.me.rank == 0:
            sys.stdin.read(1)

run_tool(main)
"""


def start(port: str, ranks: list[tuple[int, int]]) -> list[tuple[int, str, str]]:
    """Start (RANK, WORLD_SIZE) processes without torchrun; their exit codes, stdout and stderr."""
    path = {"PYTHONPATH": str(ROOT), "PATH": "", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**path, "RANK": str(rank), "WORLD_SIZE": str(size)},
        )
        for rank, size in ranks
    ]
    told = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, *both) for process, both in zip(processes, told, strict=True)]


def test_ranks_that_never_come_are_counted() -> None:
    (first,) = start(free_port(), [(0, 4)])
    assert first[0] == 1
    assert first[2].splitlines() == [
        "error: 1 of 4 ranks came within 3 s; missing: 1, 2, 3; see whether they were started, and whether "
        "WORLD_SIZE is right"
    ]


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        (first,) = start(port, [(0, 2)])
    assert first[0] == 1
    (line,) = first[2].splitlines()
    assert line.startswith(f"error: port {port} (MASTER_PORT) is in use on ")
    assert line.endswith("set MASTER_PORT to a free one")


def test_no_first_rank() -> None:
    port = free_port()
    (second,) = start(port, [(1, 2)])
    assert second[0] == 1
    (line,) = second[2].splitlines()
    assert line.startswith(f"error: no answer from rank 0 at 127.0.0.1:{port} within 3 s (")


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 in the environment and WORLD_SIZE 2; ranks count from 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK is 'a' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is '' and MASTER_PORT ''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "99999"}, "MASTER_PORT '99999'"),
    ],
)
def test_an_environment_that_cannot_be(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        meet(Launch.from_environment(), 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError) or "MASTER" in message


def test_one_rank_meets_nobody() -> None:
    assert meet(Launch(), 1) is None
    assert not dist.is_initialized()
    assert Identity.of_this_process(Launch()).pid_space
