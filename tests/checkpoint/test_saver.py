"""Saves of several ranks, beside the training: killed, failing, damaged, overtaken by the next step."""

import errno
import logging
import os
import random
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from megabts.checkpoint import folder as folder_module
from megabts.checkpoint import saver as saver_module
from megabts.checkpoint import storage
from megabts.checkpoint.manifest import CheckpointError, read_manifest, verify
from megabts.checkpoint.reader import TensorReader
from megabts.checkpoint.saver import Saved, Saver
from megabts.parallel.mesh import Axis
from tests.checkpoint.saves import PlayedRanks, assert_shares, full_piece, shares
from tests.checkpoint.test_faults import Hook, in_killed_child, tiny_disk
from tests.ranks import run_ranks

Patch = pytest.MonkeyPatch
FILES = [f"{stem}-{rank:05d}.safetensors" for stem in ("model", "optimizer") for rank in (0, 1)]
assert tiny_disk is not None  # a fixture


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(run: Path, step: int, keep_last: int | None = None, size: int = 64) -> list[Saved]:
    """Both ranks' results of a save that is waited for."""

    def work(rank: int) -> Saved:
        saver = Saver(run, rank, keep_last=keep_last, asynchronous=True)
        saver.start(step, shares(rank, 2, step, size), {"config.yaml": b"a: 1\n"}, {"x": step})
        saved = saver.wait()
        assert saved is not None
        return saved

    return PlayedRanks(2).run(work)


def test_each_rank_writes_its_own(tmp_path: Path) -> None:
    results = save(tmp_path, 10)
    assert results == [Saved(10, tmp_path / "step_00000010", "")] * 2
    assert_shares(results[0].folder, 10)
    assert sorted(path.name for path in results[0].folder.iterdir()) == ["config.yaml", "manifest.json", *FILES]
    assert read_manifest(results[0].folder).state == {"x": 10, "step": 10}
    stored = torch.arange(128.0).view(64, 2)[32:] + 10_000
    with TensorReader(results[0].folder, "model.safetensors") as reader:
        meta = shares(1, 2, 10)["model.safetensors"][0].meta
        assert torch.equal(reader.read_slice("w", meta, Axis("tp", 2, 1)), stored)


@pytest.mark.parametrize("scenario", ["second, first deleted", "same step again"])
def test_kill_at_every_system_call(tmp_path: Path, scenario: str) -> None:
    step, keep_last = (2, 1) if scenario == "second, first deleted" else (1, None)
    save(tmp_path / "dry", 1)
    hook = Hook(lambda point: None)
    with hook.installed():
        save(tmp_path / "dry", step, keep_last)
    found: Counter[int] = Counter()
    assert len(hook.points) >= 36
    for place in range(1, len(hook.points) + 1):
        run = tmp_path / str(place)
        save(run, 1)

        def die(point: int, place: int = place) -> None:
            if point == place:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(run: Path = run, die: Any = die, step: int = step) -> None:
            with Hook(die).installed():
                save(run, step, keep_last)

        assert in_killed_child(work) == signal.SIGKILL, hook.points[place - 1]
        for folder in run.glob("step_*"):
            verify(folder)
        folder = storage.resolve(run)
        number = read_manifest(folder).state["step"]
        assert_shares(folder, number)
        found[number] += 1
        assert [saved.problem for saved in save(run, 3)] == ["", ""]
        assert_shares(storage.resolve(run), 3)
        assert {path.name for path in run.iterdir()} <= {"latest", *(f"step_0000000{step}" for step in (1, 2, 3))}
    assert found[step] > 0
    assert sum(found.values()) == len(hook.points)


@pytest.mark.parametrize("name", FILES)
def test_damage_in_any_piece_is_found_and_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    folder, chance = tmp_path / "step_00000020", random.Random(name)
    path = folder / name
    whole = path.read_bytes()
    damaged: list[bytes | None] = [None, b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\0"]
    for _ in range(100):
        place, bit = chance.randrange(len(whole)), chance.randrange(8)
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    for content in damaged:
        path.unlink() if content is None else path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert storage.resolve(tmp_path).name == "step_00000010"
        assert f"{folder} is damaged: {name}" in caplog.text
        with pytest.raises(CheckpointError, match=f"step_00000020 is damaged: {name}"):
            storage.resolve(tmp_path, fallback=False)
        path.write_bytes(whole)
    assert storage.resolve(tmp_path) == folder


def test_swapped_pieces_are_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)[0].folder
    one, other = (folder / name for name in FILES[2:])
    shutil.move(one, folder / "x")
    shutil.move(other, one)
    shutil.move(folder / "x", other)
    with pytest.raises(CheckpointError, match="step_00000010 is damaged: optimizer-0000"):
        verify(folder)


def test_a_disk_that_is_full_for_one_of_two_ranks(tiny_disk: Path, monkeypatch: Patch) -> None:
    """A real one: the first rank's files fit, the second rank's do not."""
    save(tiny_disk, 10)
    first_is_done = threading.Event()
    write_file, ballast = folder_module.write_file, tiny_disk / "ballast"

    def filled(path: Path, chunks: Iterable[Any]) -> Any:
        if "-00001" in path.name:
            assert first_is_done.wait(30)
            ballast.write_bytes(bytes(shutil.disk_usage(tiny_disk).free // 4096 * 4096))
        record = write_file(path, chunks)
        if path.name == "config.yaml":
            first_is_done.set()
        return record

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_file", filled)
        results = save(tiny_disk, 20, size=20_000)
    assert results[0] == results[1]
    assert results[0].problem.startswith(f"checkpoint {tiny_disk}/step_00000020 not saved: no space (needs 0.")
    assert sorted(path.name for path in tiny_disk.iterdir()) == ["ballast", "latest", "step_00000010"]
    assert_shares(storage.resolve(tiny_disk), 10)
    monkeypatch.setattr(saver_module, "space_needed", lambda *_: 4_000_000)
    ballast.unlink()
    assert "no space (needs 8.0 MB, 2.1 MB free at" in save(tiny_disk, 20)[1].problem  # both ranks', before writing
    monkeypatch.undo()
    assert [saved.problem for saved in save(tiny_disk, 20, size=20_000)] == ["", ""]


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: Patch) -> None:
    """What changes right after the call never reaches the file, in a second save neither."""
    go, write_file = threading.Event(), folder_module.write_file

    def held(path: Path, chunks: Iterable[Any]) -> Any:
        assert go.wait(30)
        return write_file(path, chunks)

    monkeypatch.setattr(folder_module, "write_file", held)
    weight, state = torch.zeros(1000), {"list": [1]}
    saver = Saver(tmp_path, asynchronous=True)
    for step in (1, 2):
        go.clear()
        weight.fill_(step)
        saver.start(step, {"model.safetensors": [full_piece("w", weight)]}, {}, state)
        assert saver.in_flight
        assert saver.busy
        weight.fill_(-1)
        state["list"].append(step)
        go.set()
        saved = saver.wait()
        assert saved == Saved(step, tmp_path / f"step_0000000{step}", "")
        assert not saver.busy
        assert saver.advance() is saver.wait() is None
        with TensorReader(saved.folder, "model.safetensors") as reader:
            assert reader.read("w").tolist() == [step] * 1000
        assert read_manifest(saved.folder).state["list"] == [1, 1][:step]


def test_a_save_goes_on_by_itself_between_steps(tmp_path: Path) -> None:
    """As the trainer leads it: a look at every step, and never a wait."""
    saver = Saver(tmp_path, asynchronous=True, keep_last=1)
    for step in (1, 2):
        saver.start(step, {"model.safetensors": [full_piece("w", torch.ones(9))]}, {}, {})
        saved = None
        for _ in range(10_000):
            if not saver.busy:
                saved = saver.advance()
            if saved is not None:
                break
            threading.Event().wait(0.001)
        assert saved is not None
        assert saved.problem == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]


def test_what_is_nobodys_fault_on_the_disk_is_raised(tmp_path: Path, monkeypatch: Patch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(folder_module, "write_file", broken)
    saver = Saver(tmp_path)
    saver.start(1, {"model.safetensors": [full_piece("w", torch.ones(9))]}, {}, {})
    with pytest.raises(KeyError, match="a bug"):
        saver.wait()


def two_real_ranks(rank: int, run: Path) -> list[Any]:
    """Save twice, the second time in vain on rank 1; then read, each its half."""
    saver = Saver(run, rank, asynchronous=True)
    found: list[Any] = []
    write_file = folder_module.write_file

    def full(path: Path, chunks: Iterable[Any]) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in (10, 20, 30):
        if step == 20 and rank == 1:
            folder_module.write_file = full
        pieces = shares(rank, 2, step)
        saver.start(step, pieces, {"config.yaml": b"a: 1\n"}, {})
        for held in pieces.values():
            for piece in held:
                piece.tensor.fill_(0)
        saved = saver.wait()
        folder_module.write_file = write_file
        assert saved is not None
        found.append((saved.step, saved.problem.partition(" (")[0].removeprefix(f"checkpoint {run}/")))
        found.append(sorted(path.name for path in run.iterdir()))
    for number in (1, 2):
        with TensorReader(run / "step_00000030", "optimizer.safetensors") as reader:
            meta, tp = shares(0, 2, 30)["optimizer.safetensors"][0].meta, Axis("tp", number, rank % number)
            whole = torch.arange(128.0).view(64, 2) - 30_000
            found.append(torch.equal(reader.read_slice("w", meta, tp), meta.shard(whole, tp)))
    return found


def test_two_real_ranks(tmp_path: Path) -> None:
    first = ["latest", "step_00000010"]
    expected = [
        (10, ""),
        first,
        (20, "step_00000020 not saved: no space"),
        first,
        (30, ""),
        [*first, "step_00000030"],
        True,
        True,
    ]
    assert run_ranks(2, two_real_ranks, tmp_path) == [expected, expected]
    assert_shares(tmp_path / "step_00000030", 30)
