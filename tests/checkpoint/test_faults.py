"""Crashes, damage and full disks: a good step is always found, and damage is always seen."""

import builtins
import contextlib
import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megabts.checkpoint import durable, storage
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import CheckpointError, read_manifest, verify
from megabts.checkpoint.reader import load_tensors
from megabts.errors import UserError
from tests.checkpoint.saves import save_step

CALLS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it gave to the kernel, so these tests need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(run: Path, step: int, keep_last: int | None = None, size: int = 64) -> Path:
    files = {
        "model.safetensors": {"w": torch.full((size,), float(step)), "h": torch.full((3,), step)},
        "optimizer.safetensors": {"m": torch.full((size,), -float(step))},
    }
    return save_step(run, step, files, {"config.yaml": b"a: 1\n"}, {"x": step}, keep_last=keep_last)


def assert_whole(folder: Path, step: int) -> None:
    """The folder holds exactly what `save` gave for this step."""
    assert verify(folder).state == {"x": step, "step": step}
    assert load_tensors(folder, "model.safetensors")["w"].tolist() == [float(step)] * 64
    assert load_tensors(folder, "optimizer.safetensors")["m"].tolist() == [-float(step)] * 64


class Hook:
    """Calls `act` just before and just after every system call that a save makes on the disk; counts them."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act
        self.points: list[str] = []

    def point(self, name: str) -> None:
        self.points.append(name)
        self.act(len(self.points))

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*arguments: Any, **options: Any) -> Any:
            self.point(f"before {name}")
            result = call(*arguments, **options)
            self.point(f"after {name}")
            return result

        return hooked

    def open(self, path: Any, mode: str = "r") -> Any:
        # Unbuffered, so that a crash leaves the file as far as it was written.
        if mode != "wb":
            return builtins.open(path, mode)
        return HookedFile(Path(path).open(mode, buffering=0), self)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self.around(name, getattr(os, name)))
            patch.setattr(durable, "open", self.open, raising=False)
            yield


class HookedFile:
    def __init__(self, file: Any, hook: Hook) -> None:
        self.file = file
        self.write = hook.around("write", file.write)
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> "HookedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def in_killed_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; the signal that ended it, 0 if it finished."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # renews the inherited thread pool here, as two threads at once cannot
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


SCENARIOS = {
    "first": ((), 1, None),
    "second": ((1,), 2, None),
    "second, first deleted": ((1,), 2, 1),
    "same step again": ((1,), 1, None),
}


def points_of(tmp_path: Path, scenario: str) -> list[str]:
    before, step, keep_last = SCENARIOS[scenario]
    for earlier in before:
        save(tmp_path / "dry", earlier)
    hook = Hook(lambda point: None)
    with hook.installed():
        save(tmp_path / "dry", step, keep_last)
    return hook.points


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_kill_at_every_system_call(tmp_path: Path, scenario: str) -> None:
    before, step, keep_last = SCENARIOS[scenario]
    points = points_of(tmp_path, scenario)
    found: Counter[int] = Counter()
    assert len(points) >= 24
    for place in range(1, len(points) + 1):
        run = tmp_path / str(place)
        for earlier in before:
            save(run, earlier)

        def die(point: int, place: int = place) -> None:
            if point == place:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(run: Path = run, die: Callable[[int], None] = die) -> None:
            with Hook(die).installed():
                save(run, step, keep_last)

        assert in_killed_child(work) == signal.SIGKILL, points[place - 1]
        for folder in run.glob("step_*"):
            verify(folder)
        if before or storage.has_steps(run):
            folder = storage.resolve(run)
            number = read_manifest(folder).state["step"]
            assert number in {*before, step}
            assert_whole(folder, number)
            found[number] += 1
        save(run, 3)
        assert_whole(storage.resolve(run), 3)
        left = {path.name for path in run.iterdir()}
        assert left <= {"latest", "step_00000001", "step_00000002", "step_00000003"}
    assert found[step] > 0
    if before:
        assert sum(found.values()) == len(points)


@pytest.mark.parametrize("scenario", list(SCENARIOS))
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_error_at_every_system_call(tmp_path: Path, scenario: str, failure: BaseException) -> None:
    before, step, keep_last = SCENARIOS[scenario]
    for place in range(1, len(points_of(tmp_path, scenario)) + 1):
        run = tmp_path / str(place)
        for earlier in before:
            save(run, earlier)

        def fail(point: int, place: int = place) -> None:
            if point == place:
                raise failure

        hook = Hook(fail)
        with hook.installed(), contextlib.suppress(CheckpointError, KeyboardInterrupt):
            save(run, step, keep_last)
        assert len(hook.points) >= place
        if before or storage.has_steps(run):
            folder = storage.resolve(run)
            assert_whole(folder, read_manifest(folder).state["step"])
        save(run, 3)
        assert_whole(storage.resolve(run), 3)


def test_a_replacement_that_fails_or_dies_half_way(tmp_path: Path) -> None:
    folder = tmp_path / "plain name"
    write_checkpoint(folder, {}, {"a.txt": b"old"}, {})

    def fail(point: int) -> None:
        if hook.points[-1] == "before rename" and hook.points.count("before rename") == 2:
            raise OSError(errno.EIO, "Input/output error")

    def die(point: int) -> None:
        with contextlib.suppress(OSError):
            fail(point)
            return
        os.kill(os.getpid(), signal.SIGKILL)

    hook = Hook(fail)
    with hook.installed(), pytest.raises(CheckpointError, match="not saved: Input/output error"):
        write_checkpoint(folder, {}, {"a.txt": b"new"}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["plain name"]
    assert (storage.resolve(folder) / "a.txt").read_text() == "old"

    def work() -> None:
        with hook.installed():
            write_checkpoint(folder, {}, {"a.txt": b"new"}, {})

    hook.points, hook.act = [], die
    assert in_killed_child(work) == signal.SIGKILL
    assert not folder.exists()
    assert (storage.resolve(folder) / "a.txt").read_text() == "old"
    write_checkpoint(folder, {}, {"a.txt": b"new"}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["plain name"]
    assert (storage.resolve(folder) / "a.txt").read_text() == "new"


def test_random_bit_flips_are_all_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    folder = save(tmp_path, 20)
    chance = random.Random(1)
    files = [*sorted(folder.iterdir()), tmp_path / "latest"]
    assert len(files) == 5
    for path in files:
        whole = path.read_bytes()
        for _ in range(100):
            place, bit = chance.randrange(len(whole)), chance.randrange(8)
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                resolved = storage.resolve(tmp_path)
            if path.name != "latest":
                assert resolved.name == "step_00000010"
                assert path.name in caplog.text
                assert "step_00000020" in caplog.text
                with pytest.raises(CheckpointError, match=path.name):
                    storage.resolve(tmp_path, fallback=False)
            elif damaged.strip() != whole.strip():
                assert resolved.name == "step_00000020"
                assert "latest names" in caplog.text
        path.write_bytes(whole)
    assert storage.resolve(tmp_path) == folder


def test_every_single_bit_of_a_manifest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", {}, {"config.yaml": b""}, {"lr": 1e-05})
    path = tmp_path / "c" / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                read_manifest(tmp_path / "c")


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step_00000010 is damaged: model\.safetensors: its content"):
        verify(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "config.yaml", "manifest.json", "latest"]
)
def test_cut_emptied_deleted_files(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    folder = save(tmp_path, 20)
    path = tmp_path / name if name == "latest" else folder / name
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 2, None):
        path.unlink() if length is None else path.write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            resolved = storage.resolve(tmp_path)
        assert resolved.name == ("step_00000020" if name == "latest" else "step_00000010")
        assert str(path) in caplog.text or f"{folder} is damaged: {name}" in caplog.text
    path.write_bytes(whole + b"\n\0")
    assert storage.resolve(tmp_path).name == ("step_00000020" if name == "latest" else "step_00000010")


def test_swapped_files(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    one, other = folder / "model.safetensors", folder / "optimizer.safetensors"
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    with pytest.raises(CheckpointError, match="step_00000010 is damaged"):
        verify(folder)
    with pytest.raises(UserError, match="no usable checkpoint"):
        storage.resolve(tmp_path)


@pytest.mark.parametrize("text", ["", "abc", "step_00000099", "../step_00000010", "step_1", "\0", "\udcff"])
def test_senseless_tracker(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    (tmp_path / "latest").write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        assert storage.resolve(tmp_path).name == "step_00000010"
    assert "latest names" in caplog.text
    with pytest.raises(CheckpointError, match="latest names"):
        storage.resolve(tmp_path, fallback=False)


def test_no_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_200_000))
    with pytest.raises(CheckpointError, match=r"step_00000020 not saved: no space \(needs 8\.1 MB, 1\.2 MB free at /"):
        save(tmp_path, 20, size=1_000_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010"]


def test_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """Simulated: the free space looked at before is gone when the second file is written."""
    save(tmp_path, 10)

    def full(point: int) -> None:
        if hook.points[-1] == "before write" and hook.points.count("before write") == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hook = Hook(full)
    with hook.installed(), pytest.raises(CheckpointError, match=r"step_00000020 not saved: no space \(needs 0\.1 MB"):
        save(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010"]
    save(tmp_path, 20)
    assert_whole(storage.resolve(tmp_path), 20)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting needs privileges; the simulated full disk is tested above")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("preflight", [True, False])
def test_real_full_disk(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, preflight: bool) -> None:
    save(tiny_disk, 10)
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(1_000_000))
    if not preflight:
        monkeypatch.setattr("megabts.checkpoint.folder.space_needed", lambda *_: 0)
    with pytest.raises(CheckpointError, match=r"step_00000020 not saved: no space \(needs .* MB free at"):
        save(tiny_disk, 20, size=150_000)
    assert sorted(p.name for p in tiny_disk.iterdir()) == ["ballast", "latest", "step_00000010"]
    assert_whole(storage.resolve(tiny_disk), 10)
    ballast.unlink()
    save(tiny_disk, 20, size=150_000)
    assert storage.resolve(tiny_disk).name == "step_00000020"
