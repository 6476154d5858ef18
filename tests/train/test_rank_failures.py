"""A rank that fails, hangs, is slow or is signalled: told once, the rest told nothing, and no rank left behind.

Ranks are started as a user does, by torchrun or without it (srun), but for those whose speed matters.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import megabts.checkpoint.saver as saver_module
import megabts.train.trainer as trainer_module
from megabts.config.run import ParallelConfig
from megabts.parallel.mesh import build_mesh
from megabts.runtime.device import Launch
from megabts.runtime.failure import told_once
from megabts.runtime.metrics import read_metrics
from megabts.runtime.rendezvous import meet
from megabts.runtime.watchdog import watched
from megabts.train.trainer import EXIT_REQUEUE, Trainer
from tests.ranks import run_ranks
from tests.train.runs import (
    ROOT,
    arguments,
    build,
    command,
    curve,
    environment,
    error_lines,
    last_hashes,
    train_rank,
    wait_for_steps,
)

pytestmark = pytest.mark.alone

Blend = dict[str, float]

MISBEHAVES = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import megabts.train.trainer as trainer
from megabts.errors import UserError
original = trainer.train_step

def misbehaving(*args):
    if os.environ["RANK"] == os.environ["WHO"] and args[4] == 3:
        with open(os.environ["MARK"], "w") as file:
            file.write(f"{{os.getpid()}} {{time.monotonic()}}")
        if os.environ["HOW"] == "raise":
            raise UserError("I have had enough")
        lock = threading.Lock()
        lock.acquire()
        if os.environ["HOW"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        lock.acquire()
    return original(*args)

trainer.train_step = misbehaving
sys.argv[0] = {str(ROOT / "tools/train.py")!r}
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


@dataclass
class Ended:
    """Two ranks of which one misbehaved."""

    pid: int
    """Of the one that did."""
    told: float
    """Seconds from then to the first line on stderr; `gone`: from that to the end of the last process."""
    gone: float
    err: str
    codes: list[int]


def misbehave(starter: str, who: int, how: str, args: list[str], folder: Path) -> Ended:
    """Start two ranks by torchrun or srun; in step 4 rank `who` raises, stops or hangs in a lock."""
    script, mark = folder / "misbehaving.py", folder / "mark"
    script.write_text(MISBEHAVES)
    base = environment() | {"WHO": str(who), "HOW": how, "MARK": str(mark)}
    if starter == "torchrun":
        launcher = ["-m", "megabts.runtime.torchrun", "--standalone", "--nproc-per-node", "2"]
        starts = [([*launcher, str(script)], base)]
    else:
        common = base | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        starts = [([str(script)], common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    ours, theirs = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, *start, *args], stdout=subprocess.DEVNULL, stderr=theirs, env=env, start_new_session=True
        )
        for start, env in starts
    ]
    os.close(theirs)
    last_resort = threading.Timer(150, lambda: [os.killpg(process.pid, signal.SIGKILL) for process in processes])
    last_resort.start()
    lines, times = [], []
    with os.fdopen(ours) as err:
        for line in err:  # to the end of the last process that can write there
            lines.append(line)
            times.append(time.monotonic())
    end = time.monotonic()
    last_resort.cancel()
    codes = [process.wait() for process in processes]
    pid, begin = mark.read_text().split()
    return Ended(int(pid), times[0] - float(begin), end - times[0], "".join(lines), codes)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(("starter", "who"), [("torchrun", 1), ("srun", 0)])
def test_one_rank_that_raises_ends_all_and_is_told_once(starter: str, who: int, blend: Blend, tmp_path: Path) -> None:
    """Also where the ranks' store goes with it. Nothing else is on stderr."""
    ended = misbehave(starter, who, "raise", arguments(tmp_path / "run", blend, train__steps=1000), tmp_path)
    assert ended.err == "error: I have had enough\n"
    assert set(ended.codes) == {1}
    assert ended.told + ended.gone < 10


HANGS = (("torchrun", 1, "lock"), ("torchrun", 1, "stop"), ("srun", 0, "stop"))


@pytest.fixture(scope="module")
def hung(blend: Blend, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], Ended]:
    """All that hang, side by side: most of their time they wait."""
    folders = [tmp_path_factory.mktemp("hung") for _ in HANGS]

    def start(case: tuple[str, int, str], folder: Path) -> Ended:
        args = arguments(folder / "run", blend, train__steps=1000, parallel__timeout=8)
        return misbehave(*case, args, folder)

    with ThreadPoolExecutor(len(HANGS)) as pool:
        return dict(zip(HANGS, pool.map(start, HANGS, folders)))


@pytest.mark.parametrize(("starter", "who", "how"), HANGS)
def test_a_rank_that_hangs_is_named_with_its_stack(
    starter: str, who: int, how: str, hung: dict[tuple[str, int, str], Ended]
) -> None:
    """Without torchrun the first rank keeps the ranks' store: stopped, it leaves the others to themselves."""
    ended = hung[starter, who, how]
    assert 8 - 1 < ended.told < 8 + 5, ended
    assert ended.gone < 15
    assert not Path(f"/proc/{ended.pid}").exists()
    assert all(ended.codes)
    assert ended.err.startswith(f"error: rank {who} (")
    (line,) = error_lines(ended.err)
    assert f"pid {ended.pid}) hangs: " in line
    assert "no progress for 8 s" in line
    assert ("stopped by a signal (SIGSTOP)" in line) == (how == "stop")
    assert re.search(r'misbehaving.py", line \d+,? in misbehaving', ended.err)


def train_watched(rank: int, args: list[str], port: str, folder: Path, case: str) -> tuple[int, str]:
    """Train with a watchdog of 3 s; exit code, and what came on stderr.

    `slow`: up to step 20 the second rank takes three times as long. `long`: the first one is held up for longer than
    the time-out at the start and in the last save.
    """
    import torch._dynamo  # the first optimizer would, for seconds

    assert torch._dynamo
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    train_step, publish_step = trainer_module.train_step, saver_module.publish_step

    def delayed(*given: Any) -> Any:
        if case == "slow" and given[4] < 20:
            time.sleep(0.3 if rank == 1 else 0.1)
        return train_step(*given)

    def held_up(*given: Any, **more: Any) -> None:
        time.sleep(5 if case == "long" else 0)
        publish_step(*given, **more)

    trainer_module.train_step, saver_module.publish_step = delayed, held_up
    trainer_module.peak_flops = lambda *_: None  # type: ignore[assignment, misc]  # as in runs.fit
    told = folder / f"err-{rank}"
    with told.open("w") as file:
        os.dup2(file.fileno(), 2)
    with watched(meet(Launch(rank, 2, rank, 2), 60), 3) as progress:
        if case == "long" and rank == 0:
            time.sleep(5)
        code = Trainer(build(args, build_mesh(ParallelConfig(), 2, rank)), progress).fit()
    return code, told.read_text()


def test_a_slow_rank_is_named_soon_and_none_else(blend: Blend, tmp_path: Path) -> None:
    """Within 20 steps; in the 200 that follow nobody is slow, and after a hundred of them it would be said again."""
    args = arguments("", blend, train__steps=220)
    (code, told), second = run_ranks(2, train_watched, args, free_port(), tmp_path, "slow")
    assert (code, second) == (0, (0, ""))
    found = re.fullmatch(r"warning: rank 1 \(.*\) is slow: at step (\d+) it works .* as the median .*\n", told)
    assert found, told
    assert int(found[1]) <= 20


def test_a_long_start_or_save_of_one_rank_is_no_hang(blend: Blend, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", blend, train__steps=3, checkpoint__asynchronous=False)
    begin = time.monotonic()
    assert run_ranks(2, train_watched, args, free_port(), tmp_path, "long") == [(0, ""), (0, "")]
    assert time.monotonic() - begin > 2 * 5


def ranks_of(torchrun: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank of a torchrun's children."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "stat").read_text().split()[3] == str(torchrun.pid):
                names = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(name[5:]): int(folder.name) for name in names if name.startswith(b"RANK=")}
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=["kill", "usr1"])
def test_two_ranks_of_which_one_is_signalled(number: signal.Signals, blend: Blend, tmp_path: Path) -> None:
    """SIGKILL to one rank ends both at once; SIGUSR1 saves and ends both; either way the resumed run is the same."""
    run_ranks(2, train_rank, arguments(tmp_path / "unbroken", blend, train__steps=100, checkpoint__every=10), 2)
    settings: dict[str, Any] = {"train__steps": 100, "checkpoint__every": 10, "checkpoint__resume": True}
    args = arguments(tmp_path / "run", blend, **settings)
    torchrun = subprocess.Popen(
        command("train.py", args, 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    ranks: dict[int, int] = {}
    try:
        wait_for_steps(tmp_path / "run", 25, torchrun)
        ranks = ranks_of(torchrun)
        os.kill(ranks[1], number)
        begin = time.monotonic()
        out, err = torchrun.communicate(timeout=30)
        assert time.monotonic() - begin < 15
    finally:
        torchrun.kill()
    assert set(ranks) == {0, 1}
    assert not any(map(alive, ranks.values()))
    done = len(read_metrics(tmp_path / "run")[0])
    assert 25 <= done < 100
    if number == signal.SIGKILL:
        assert len(error_lines(err)) == 1, err
        (line,) = error_lines(err)
        assert line.startswith("error: lost contact with another rank: it was killed or hangs")
        assert line.endswith("start again with --checkpoint.resume true")
    else:
        assert error_lines(err) == []
        assert f"stopped by a signal after step {done}; start again with --checkpoint.resume true" in out
        assert (tmp_path / "run/latest").read_text() == f"step_{done:08d}\n"
        assert err.count(f"(exitcode: {EXIT_REQUEUE})") == 1
    assert run_ranks(2, train_rank, args, 2) == [0, 0]
    assert curve(tmp_path / "run") == curve(tmp_path / "unbroken")
    assert last_hashes(tmp_path / "run") == last_hashes(tmp_path / "unbroken")


def test_one_rank_alone_tells_its_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(KeyError), told_once():
        raise KeyError("as it was")
