"""Several ranks: the same losses as one, one writer, and one message for what cannot be."""

import errno
import json
import os
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
from megabts.runtime.cores import num_cores
from megabts.runtime.device import Launch, share_cores
from megabts.runtime.metrics import read_metrics
from tests.ranks import run_ranks
from tests.train.runs import BTS_SETTINGS, arguments, error_lines, shell, train, train_rank

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
        "error: train.global_batch 6 is not a multiple of train.micro_batch 2 x 2 data-parallel ranks = 4; "
        "change one of them"
    ]
    assert 'train.py", line' not in done.stderr
    assert "train.global_batch:" not in done.stdout, "settings listed beside the refusal"
    assert time.monotonic() - begin < 45


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
