"""Several ranks: the same losses as one, one writer, one message when one fails, and no rank left behind."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megabts.checkpoint.folder as folder_module
import megabts.checkpoint.hf as hf_module
import megabts.checkpoint.manifest as manifest_module
from megabts.checkpoint.manifest import CheckpointError
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.device import Launch, num_cores, share_cores
from megabts.runtime.failure import told_once
from megabts.runtime.metrics import read_metrics
from megabts.train.trainer import EXIT_REQUEUE
from tests.ranks import run_ranks
from tests.train.runs import (
    BTS_SETTINGS,
    ROOT,
    arguments,
    command,
    curve,
    environment,
    error_lines,
    last_hashes,
    shell,
    train,
    train_rank,
    wait_for_steps,
)

Blend = dict[str, float]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)[0]]


@pytest.mark.parametrize("method", ["dense", "bts"])
def test_two_ranks_train_like_one(method: str, data: Path, blend: Blend, tmp_path: Path) -> None:
    """Gate dropout included: its masks go by the samples, not by who computes them."""
    settings: dict[str, Any] = {"data__valid": json.dumps({"v": str(data / "valid_b")}), "train__valid_every": 0}
    if method == "bts":
        blend, settings = {str(data / "ids"): 1.0}, {"base": BTS_SETTINGS, "train__steps": 6}
    for name in ("one", "two"):
        args = arguments(tmp_path / name, blend, **settings)
        assert train(args) == 0 if name == "one" else run_ranks(2, train_rank, args, 2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    weights = [load_file(next((tmp_path / name).glob("step_*")) / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        # Adam divides by the root of the gradient's square: where a gradient is almost 0, rounding decides its sign.
        assert (tensor - weights[1][name]).abs().mean() < 1e-5
    valid = [read_metrics(tmp_path / name)[1] for name in ("one", "two")]
    if method == "dense":
        assert valid[1][0]["valid"]["v"] == pytest.approx(valid[0][0]["valid"]["v"], rel=1e-5)


def watched(rank: int, args: list[str]) -> tuple[int, list[str]]:
    """Train, and say which files this rank opened for writing or made."""
    written: list[str] = []

    def watch(event: str, found: tuple[Any, ...]) -> None:
        wrote = event == "open" and isinstance(found[2], int) and found[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (wrote or event in ("os.mkdir", "os.rename")) and isinstance(found[0], (str, Path)):
            written.append(str(found[0]))

    sys.addaudithook(watch)
    return train_rank(rank, args, 2), written


def test_other_ranks_write_their_shards_alone(blend: Blend, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", blend, checkpoint__every=5, logging__tensorboard=True)
    (first, by_first), (second, by_second) = run_ranks(2, watched, args)
    assert (first, second) == (0, 0)
    assert any("metrics.jsonl" in path for path in by_first)
    shards = [f"{tmp_path}/run/.step_{step:08d}.tmp/optimizer-00001.safetensors" for step in (5, 10, 12)]
    assert [path for path in by_second if path.startswith(str(tmp_path))] == shards


def count_hashed(rank: int, args: list[str]) -> tuple[int, list[str]]:
    """Train, and say which checkpoint files this rank read to hash them."""
    hashed: list[str] = []
    for module in (manifest_module, hf_module):
        setattr(module, "read_chunks", partial(_noted, module.read_chunks, hashed))  # noqa: B010
    return train_rank(rank, args, 2), hashed


def _noted(read: Callable[[Path], Iterator[bytes]], hashed: list[str], path: Path) -> Iterator[bytes]:
    hashed.append(path.name)
    return read(path)


def test_only_the_first_rank_verifies_what_a_run_starts_from(data: Path, tmp_path: Path) -> None:
    """It reads every file once: the members when they are stitched anew, stitches and members of a checkpoint."""
    ids = {str(data / "ids"): 1.0}
    args = arguments(tmp_path / "new", ids, BTS_SETTINGS, train__steps=1)
    (_, first), (_, second) = run_ranks(2, count_hashed, args)
    assert sorted(first) == ["config.json"] * 3 + ["model.safetensors"] * 3
    assert second == []
    base = {name: value for name, value in BTS_SETTINGS.items() if not name.startswith(("bts.", "method"))}
    args = arguments("", ids, base, train__steps=1, checkpoint__init_from=tmp_path / "new")
    (_, first), (_, second) = run_ranks(2, count_hashed, args)
    assert sorted(first) == sorted(
        ["config.json", "model.safetensors"] * 3
        + ["config.yaml", "model.safetensors", "tokenizer_spec.json"]
        + [f"optimizer-{rank:05d}.safetensors" for rank in (0, 1)]
    )
    assert second == []


def refused(rank: int, args: list[str]) -> str:
    """Train while no save succeeds on the second rank; the error's message."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 1:
        folder_module.write_file = full  # type: ignore[assignment]
    try:
        train_rank(rank, args, 2)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_failed_save_is_known_to_every_rank(blend: Blend, tmp_path: Path) -> None:
    """One alone fails; nobody waits for it or goes on without it."""
    args = arguments(tmp_path / "run", blend, checkpoint__every=5)
    first, second = run_ranks(2, refused, args)
    assert first == second
    assert first.startswith(f"checkpoint {tmp_path}/run/step_00000012 not saved: no space (needs ")
    assert first.endswith("; nothing was saved yet")
    assert not list((tmp_path / "run").glob("*step_*"))


def test_the_batch_must_fit_the_ranks(blend: Blend, tmp_path: Path) -> None:
    """All ranks refuse it before they meet in training; one of them says so, and torchrun has nothing to wait for."""
    begin = time.monotonic()
    done = shell("train.py", arguments(tmp_path / "run", blend, train__global_batch=6), num_ranks=2)
    assert done.returncode == 1
    assert error_lines(done.stderr) == [
        "error: train.global_batch 6 is not a multiple of train.micro_batch 2 x 2 data-parallel ranks = 4"
    ]
    assert 'train.py", line' not in done.stderr
    assert time.monotonic() - begin < 45


ONE_RAISES = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import megabts.train.step as step
import megabts.train.trainer as trainer
from megabts.errors import UserError
original = step.train_step

def failing(*args):
    if os.environ["RANK"] == "1" and args[4] == 3:
        raise UserError("rank 1 has had enough")
    return original(*args)

trainer.train_step = failing
sys.argv[0] = {str(ROOT / "tools/train.py")!r}
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


def test_one_rank_that_raises_ends_all_and_is_told_once(blend: Blend, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(ONE_RAISES)
    begin = time.monotonic()
    args = [str(tmp_path / "failing.py"), *arguments(tmp_path / "run", blend, train__steps=1000)]
    launch = [*command("", [], 2)[:-1], *args]
    done = subprocess.run(launch, capture_output=True, text=True, env=environment(), timeout=60)
    assert time.monotonic() - begin < 45
    assert done.returncode == 1
    assert error_lines(done.stderr) == ["error: rank 1 has had enough"]
    assert "Connection" not in done.stderr
    assert "gloo" not in done.stderr


HANGS = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import torch._dynamo
import megabts.train.step as step
import megabts.train.trainer as trainer
original = step.train_step

def hanging(*args):
    if os.environ["RANK"] == "1" and args[4] == 3:
        lock = threading.Lock()
        lock.acquire()
        if os.environ["HOW"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        lock.acquire()
    return original(*args)

trainer.train_step = hanging
sys.argv[0] = {str(ROOT / "tools/train.py")!r}
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


@pytest.mark.parametrize("how", ["lock", "stop"])
def test_a_rank_that_hangs_is_named_with_its_stack(how: str, blend: Blend, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGS)
    args = arguments(tmp_path / "run", blend, train__steps=1000, parallel__timeout=10)
    launch = [*command("", [], 2)[:-1], str(tmp_path / "hanging.py"), *args]
    torchrun = subprocess.Popen(
        launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | {"HOW": how}
    )
    ranks: dict[int, int] = {}
    try:
        wait_for_steps(tmp_path / "run", 3, torchrun)
        ranks, begin = ranks_of(torchrun), time.monotonic()
        err = torchrun.communicate(timeout=60)[1]
        seconds = time.monotonic() - begin
    finally:
        torchrun.kill()
    assert seconds < 10 + 15, err
    assert set(ranks) == {0, 1}
    assert not any(map(alive, ranks.values()))
    assert len(error_lines(err)) == 1, err
    (line,) = error_lines(err)
    assert line.startswith("error: rank 1 (")
    assert f"pid {ranks[1]}) hangs: " in line
    assert "no progress for 10 s" in line
    assert ("stopped by a signal (SIGSTOP)" in line) == (how == "stop")
    stack = err.partition(line)[2]
    assert re.search(r'hanging.py", line \d+,? in hanging', stack)


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
    done = len(losses(tmp_path / "run"))
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


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        share_cores(Launch(0, 2, 0, local_world_size=num_cores() * 2))
        assert torch.get_num_threads() == 1
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        share_cores(Launch())
        assert torch.get_num_threads() == num_cores()
    finally:
        torch.set_num_threads(before)
    assert ParallelMesh().world_size == 1
