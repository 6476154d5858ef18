"""Numbers that are not finite, disks that are full, folders in use: what training does, and what it says."""

import errno
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megabts.checkpoint.folder as folder_module
import megabts.train.step as step_module
from megabts.checkpoint.lock import RunLock
from megabts.checkpoint.manifest import CheckpointError
from megabts.checkpoint.storage import resolve
from megabts.data.loader import Batch
from megabts.errors import UserError
from megabts.runtime.metrics import MetricsLogger, read_metrics
from megabts.train.stages import Stages
from megabts.train.trainer import EXIT_REQUEUE
from tests.train.runs import arguments, build, shell, train

Blend = dict[str, float]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def spoil(patch: Patch, steps: set[int], factor: float = math.nan) -> None:
    """Multiply the loss of these steps (from 0, batches of 4) by `factor`."""
    original = Stages.forward

    def spoilt(stages: Stages, chunk: int, batch: Batch, *rest: Any) -> torch.Tensor:
        loss = original(stages, chunk, batch, *rest)
        return loss * factor if batch.first_sample // 4 in steps else loss

    patch.setattr(Stages, "forward", spoilt)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped(
    factor: float, blend: Blend, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    spoil(monkeypatch, {3}, factor)
    assert train(arguments(tmp_path / "run", blend, train__steps=6, checkpoint__every=1, checkpoint__keep=0)) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        saved = {step: load_file(tmp_path / f"run/step_{step:08d}" / name) for step in (3, 4, 5)}
        assert all(torch.equal(saved[3][key], saved[4][key]) for key in saved[3])
        assert any(not torch.equal(saved[4][key], saved[5][key]) for key in saved[3])
    rows = read_metrics(tmp_path / "run")[0]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [math.isfinite(row["loss"]) for row in rows] == [True, True, True, False, True, True]
    assert f"warning: step 4 skipped: loss is {factor}; parameters unchanged" in capsys.readouterr().out


def test_three_bad_steps_end_the_run(blend: Blend, tmp_path: Path, monkeypatch: Patch) -> None:
    spoil(monkeypatch, {1, 5, 6, 7})
    with pytest.raises(UserError) as caught:
        train(arguments(tmp_path / "run", blend, checkpoint__every=2))
    assert str(caught.value) == (
        "3 bad steps in a row up to step 8 (loss is nan); last good: step 6; lower optimizer.lr or look at the data"
    )
    assert resolve(tmp_path / "run").name == "step_00000006"


def test_bad_steps_in_a_row_are_counted_across_a_resume(blend: Blend, tmp_path: Path, monkeypatch: Patch) -> None:
    spoil(monkeypatch, {4, 5, 6})
    args = arguments(tmp_path / "run", blend, checkpoint__resume=True, checkpoint__every=6)
    for _ in range(2):  # the second start has two bad steps behind it, from the checkpoint of step 6
        with pytest.raises(UserError, match=r"3 bad steps in a row up to step 7 .* last good: step 6"):
            train(args)


def test_nothing_saved_is_said(blend: Blend, tmp_path: Path, monkeypatch: Patch) -> None:
    spoil(monkeypatch, set(range(9)))
    with pytest.raises(UserError, match=r"up to step 3 \(loss is nan\); nothing was saved yet"):
        train(arguments(tmp_path / "run", blend))


def fill_disk(patch: Patch, saves: set[int]) -> None:
    """Let these saves (from 1) find no space, in the middle of a file."""
    write, count = folder_module.write_file, [0]

    def full(path: Path, chunks: Any) -> Any:
        count[0] += path.name == "model.safetensors"
        if path.name == "optimizer.safetensors" and count[0] in saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, chunks)

    patch.setattr(folder_module, "write_file", full)


def test_a_failed_save_is_a_warning(blend: Blend, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    fill_disk(monkeypatch, {2})
    assert train(arguments(tmp_path / "run", blend, checkpoint__every=4, checkpoint__keep=0)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not saved" in line]
    assert line.startswith(f"warning: checkpoint {tmp_path}/run/step_00000008 not saved: no space (needs ")
    assert line.endswith("training continues, last good: step 4")
    assert sorted(path.name for path in (tmp_path / "run").glob("*step_*")) == ["step_00000004", "step_00000012"]


@pytest.mark.parametrize(
    "saves, settings, good",
    [({2}, {"checkpoint__save_fail": "stop"}, "last good: step 4"), ({3}, {}, "last good: step 8")],
    ids=["asked to stop", "last save"],
)
def test_a_failed_save_ends_the_run(
    saves: set[int], settings: dict[str, Any], good: str, blend: Blend, tmp_path: Path, monkeypatch: Patch
) -> None:
    fill_disk(monkeypatch, saves)
    with pytest.raises(CheckpointError, match=f"not saved: no space .*; {good}"):
        train(arguments(tmp_path / "run", blend, checkpoint__every=4, **settings))
    assert CheckpointError.exit_code == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, blend: Blend, monkeypatch: Patch, capsys: Capture) -> None:
    """A real one: full from before step 4 to after step 8, so that neither step 5 nor the metrics find a place."""
    original, run_dir = step_module.train_step, small_disk / "run"

    def filled(*args: Any) -> Any:
        if args[4] == 3:
            free = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(bytes(free))
        if args[4] == 8:
            (small_disk / "filler").unlink()
        return original(*args)

    monkeypatch.setattr("megabts.train.trainer.train_step", filled)
    assert train(arguments(run_dir, blend, checkpoint__every=5, checkpoint__keep=1, logging__tensorboard=True)) == 0
    out = capsys.readouterr().out
    assert f"checkpoint {run_dir}/step_00000005 not saved: no space (needs " in out
    assert "free some or keep fewer steps; training continues, nothing was saved yet" in out
    assert (run_dir / "latest").read_text() == "step_00000012\n"
    assert [row["step"] for row in read_metrics(run_dir)[0]] == list(range(1, 13))


def test_metrics_that_cannot_be_written_are_said_once(
    blend: Blend, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLogger, "log_step", full)
    assert train(arguments(tmp_path / "run", blend, train__steps=3)) == 0
    out = capsys.readouterr().out
    assert out.count("warning: metrics not written: No space left on device; training continues") == 1


def test_a_folder_in_use_is_refused(blend: Blend, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", blend)
    run = build(args)
    with RunLock(tmp_path / "run"):
        done = shell("train.py", args)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path}/run is in use by process {os.getpid()} on host {os.uname().nodename}; "
        "stop that run or use another folder\n"
    )
    assert run.loader is not None


@pytest.mark.parametrize("damage", ["model.safetensors", "manifest.json", "config.yaml", "optimizer.safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: str, blend: Blend, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    assert train(arguments(tmp_path / "unbroken", blend)) == 0
    args = arguments(tmp_path / "run", blend, checkpoint__every=3)
    spoil(monkeypatch, {6, 7, 8})
    with pytest.raises(UserError, match="bad steps"):
        train(args)
    monkeypatch.undo()
    path = tmp_path / "run/step_00000006" / damage
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert train([*args, "--checkpoint.resume"]) == 0
    out = capsys.readouterr().out
    assert f"step_00000006 is damaged: {damage}" in out
    assert f"resumed from {tmp_path}/run/step_00000003 after step 3" in out
    same = [load_file(tmp_path / name / "step_00000012/model.safetensors") for name in ("run", "unbroken")]
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items())


def test_when_all_are_damaged_nothing_starts_from_scratch(blend: Blend, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", blend, train__steps=1)
    assert train(args) == 0
    (tmp_path / "run/step_00000001/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*model.safetensors: 0 bytes instead of"):
        train([*args, "--checkpoint.resume"])
    assert EXIT_REQUEUE not in (CheckpointError.exit_code, 0)
