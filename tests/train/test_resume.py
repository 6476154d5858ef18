"""A run that was killed or told to stop and then resumed is, bit for bit, the run that nobody touched."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import megabts.train.step as step_module
import megabts.train.trainer as trainer_module
from megabts.data.loader import Batch
from megabts.errors import UserError
from megabts.runtime.metrics import read_metrics
from megabts.train.stages import Stages
from megabts.train.trainer import EXIT_REQUEUE
from tests.train.runs import (
    BTS_SETTINGS,
    Nursery,
    arguments,
    curve,
    last_hashes,
    make_data,
    train,
    wait_for_steps,
)

Arguments = Callable[..., list[str]]
Patch = pytest.MonkeyPatch

VARIANTS: dict[str, dict[str, Any]] = {
    "accumulation": {},
    "bfloat16": {"precision__dtype": "bfloat16", "checkpoint__asynchronous": False},
    "bts": {"base": BTS_SETTINGS, "precision__frozen": "bfloat16"},
    "adam-wsd": {"optimizer__schedule": "wsd", "optimizer__warmup_steps": 4, "train__recompute": "full"},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, data: Path, blend: dict[str, float]) -> Arguments:
    """Makes the arguments of a run of 30 steps that saves every 5."""
    settings = VARIANTS[request.param]
    blend = {str(data / "ids"): 1.0} if "base" in settings else blend

    def make(run_dir: Path, **more: Any) -> list[str]:
        return arguments(run_dir, blend, **{**settings, "train__steps": 30, "checkpoint__every": 5, **more})

    return make


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Where the runs that are killed live."""
    with closing(Nursery()) as nursery:
        yield nursery


def kill_and_resume(nursery: Nursery, args: list[str], run_dir: Path, kills: int, steps: int) -> int:
    """Start the run again and again, killing it `kills` times at random moments. Returns the steps that were redone."""
    rng, redone = random.Random(kills), 0
    args = [*args, "--checkpoint.resume", "true"]
    for number in range(kills):
        nursery.start(args)
        wait_for_steps(run_dir, rng.randrange(steps * number // kills + 1, steps * (number + 1) // kills + 1), nursery)
        time.sleep(rng.random() * 0.03)
        nursery.kill()
        done = len(read_metrics(run_dir)[0])
        latest = run_dir / "latest"
        redone += done - (int(latest.read_text().strip()[5:]) if latest.exists() else 0)
    nursery.start(args)
    assert nursery.wait() == 0
    return redone


def assert_same_run(killed: Path, unbroken: Path, steps: int) -> None:
    assert curve(killed) == curve(unbroken)
    assert len(curve(killed)) == steps
    assert last_hashes(killed) == last_hashes(unbroken)


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("variant", "kills", "steps"),
    [("bfloat16", 3, 30), ("adam-wsd", 3, 30), ("accumulation", 20, 200), ("bts", 20, 200)],
    indirect=["variant"],
)
def test_killed(nursery: Nursery, variant: Arguments, kills: int, steps: int, tmp_path: Path) -> None:
    assert train(variant(tmp_path / "unbroken", train__steps=steps)) == 0
    args = variant(tmp_path / "killed", train__steps=steps)
    redone = kill_and_resume(nursery, args, tmp_path / "killed", kills, steps)
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken", steps)
    # For every kill at most one step under way and those between two checkpoints; twice those while one is written.
    waits = "--checkpoint.asynchronous=false" in args
    assert redone <= kills * (6 if waits else 11)


def signal_at(step: int, numbers: tuple[int, ...], patch: Patch) -> None:
    """Send this process signals in the middle of step `step` (from 0)."""
    original = step_module.train_step

    def signalled(*args: Any) -> Any:
        if args[4] == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*args)

    patch.setattr(trainer_module, "train_step", signalled)


SIGNALS = [(signal.SIGTERM,), (signal.SIGUSR1,), (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize("numbers", SIGNALS, ids=["term", "usr1", "three at once"])
def test_a_signal_saves_at_the_end_of_the_step(
    numbers: tuple[int, ...],
    blend: dict[str, float],
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(arguments(tmp_path / "unbroken", blend)) == 0
    args = arguments(tmp_path / "run", blend, checkpoint__resume=True)
    with monkeypatch.context() as patch:
        signal_at(6, numbers, patch)
        assert train(args) == EXIT_REQUEUE == 85
    assert (tmp_path / "run/latest").read_text() == "step_00000007\n"
    assert "stopped by a signal after step 7; start again with --checkpoint.resume true" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(args) == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken", 12)


def test_a_signal_in_the_last_step_finishes(blend: dict[str, float], tmp_path: Path, monkeypatch: Patch) -> None:
    signal_at(11, (signal.SIGTERM,), monkeypatch)
    assert train(arguments(tmp_path / "run", blend)) == 0
    assert (tmp_path / "run/latest").read_text() == "step_00000012\n"


def test_a_finished_run_says_so(blend: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(tmp_path / "run", blend, train__steps=3)
    assert train(args) == 0
    before = curve(tmp_path / "run"), last_hashes(tmp_path / "run")
    capsys.readouterr()
    assert train([*args, "--checkpoint.resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("run is finished: it has 3 of 3 steps; nothing to do")
    assert (curve(tmp_path / "run"), last_hashes(tmp_path / "run")) == before


def test_a_used_folder_is_not_started_in(blend: dict[str, float], tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", blend, train__steps=1)
    assert train(args) == 0
    with pytest.raises(UserError, match=r"run holds a run already; continue it with --checkpoint.resume true, or"):
        train(args)


def test_skipped_steps_do_not_count_as_updates_after_a_resume(
    blend: dict[str, float], tmp_path: Path, monkeypatch: Patch
) -> None:
    """Adam's bias correction goes by updates made, not by steps tried."""
    original = Stages.forward

    def bad_at_third_step(stages: Stages, chunk: int, batch: Batch, *rest: Any) -> torch.Tensor:
        loss = original(stages, chunk, batch, *rest)
        return loss * float("nan") if batch.first_sample // 4 == 2 else loss

    monkeypatch.setattr(Stages, "forward", bad_at_third_step)
    assert train(arguments(tmp_path / "unbroken", blend)) == 0
    args = arguments(tmp_path / "run", blend, checkpoint__resume=True)
    with monkeypatch.context() as patch:
        signal_at(5, (signal.SIGTERM,), patch)
        assert train(args) == EXIT_REQUEUE
    assert train(args) == 0
    assert read_metrics(tmp_path / "run")[0][-1]["skipped_steps"] == 1
    assert last_hashes(tmp_path / "run") == last_hashes(tmp_path / "unbroken")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data (its own, to be damaged) and a run stopped after step 4 of 12, to be copied."""
    folder = make_data(tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(3, (signal.SIGTERM,), patch)
        assert train(arguments(folder / "run", {str(folder / "a"): 0.7, str(folder / "b"): 0.3})) == EXIT_REQUEUE
    return folder


def resume_arguments(stopped: Path, run_dir: Path, **more: Any) -> list[str]:
    weight = more.pop("weight", 0.7)
    shutil.copytree(stopped / "run", run_dir)
    blend = {str(stopped / "a"): weight, str(stopped / "b"): 0.3}
    return arguments(run_dir, blend, checkpoint__resume=True, **more)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"train__steps": 13}, "train.steps: 12 -> 13"),
    "blend": ({"weight": 0.2}, "data.train: {'a': 0.7, 'b': 0.3} -> {'a': 0.2, 'b': 0.3}"),
    "seed": ({"train__seed": 5}, "train.seed: 0 -> 5"),
    "data seed": ({"data__seed": 5}, "data.seed: 1234 -> 5"),
    "seq_length": ({"data__seq_length": 16}, "data.seq_length: 32 -> 16"),
    "batch": ({"train__global_batch": 8}, "train.global_batch: 4 -> 8"),
    "lr": ({"optimizer__lr": 0.02}, "optimizer.lr: 0.01 -> 0.02"),
    "stitches": (
        {"bts__num_stitch_layers": 2, "bts__placement": "[3, 4]"},
        "bts.num_stitch_layers: 4 -> 2; bts.placement: [] -> [3, 4]",
    ),
    "dtype": ({"precision__dtype": "bfloat16"}, "precision.dtype: float32 -> bfloat16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_not_a_resumed_one(change: str, stopped: Path, tmp_path: Path) -> None:
    more, message = CHANGES[change]
    args = resume_arguments(stopped, tmp_path / "run", **more)
    with pytest.raises(UserError) as caught:
        train(args)
    assert message in str(caught.value)
    assert "insist with --checkpoint.force_resume true" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert train([*args, "--checkpoint.force_resume"]) == 0


def test_free_settings_may_change(stopped: Path, tmp_path: Path) -> None:
    more = {"train__micro_batch": 4, "logging__every": 3, "checkpoint__every": 2, "train__valid_samples": 3}
    assert train(resume_arguments(stopped, tmp_path / "run", **more)) == 0


def test_data_may_move_but_not_change(stopped: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        for suffix in ("bin", "idx", "json"):
            shutil.copy2(stopped / f"{name}.{suffix}", tmp_path)
    blend = {str(tmp_path / "a"): 0.7, str(tmp_path / "b"): 0.3}
    moved = [*resume_arguments(stopped, tmp_path / "run"), f"--data.train={json.dumps(blend)}"]
    os.utime(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"data files or their order: \w{12} -> \w{12}; restore them"):
        train(moved)
    shutil.copy2(stopped / "a.bin", tmp_path)
    assert train(moved) == 0


def test_another_tokenizer_is_refused(stopped: Path, tmp_path: Path) -> None:
    args = resume_arguments(stopped, tmp_path / "run", data__tokenizer="null:257")
    with pytest.raises(UserError, match=r"was tokenized with bytes \(sha \w+..\), the model expects null:257"):
        train(args)
    # Data that does not say how it was made leaves it to the checkpoint to know.
    for name in ("a", "b"):
        for suffix in ("bin", "idx"):
            shutil.copy2(stopped / f"{name}.{suffix}", tmp_path)
    blend = {str(tmp_path / "a"): 0.7, str(tmp_path / "b"): 0.3}
    with pytest.raises(UserError, match=r"data.tokenizer: bytes \(sha \w+..\) -> null:257 \(sha \w+..\)"):
        train([*args, f"--data.train={json.dumps(blend)}"])


def test_another_model_is_refused_even_by_force(stopped: Path, tmp_path: Path) -> None:
    args = resume_arguments(stopped, tmp_path / "run", model__hidden_size=64, model__head_dim=8)
    with pytest.raises(UserError, match=r"model\.hidden_size: 32 -> 64"):
        train(args)
    with pytest.raises(UserError, match=r"has shape \(257, 32\), the model \(257, 64\)"):
        train([*args, "--checkpoint.force_resume"])


def test_a_changed_member_is_refused(data: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """Another expert of the same sizes under the same name."""
    args = arguments(tmp_path / "run", {str(data / "ids"): 1.0}, BTS_SETTINGS, checkpoint__resume=True)
    with monkeypatch.context() as patch:
        signal_at(1, (signal.SIGTERM,), patch)
        assert train(args) == EXIT_REQUEUE
    other = Path(str(BTS_SETTINGS["bts.hub"])).parent / "words"
    with pytest.raises(UserError, match=r"member math: \w{12} -> \w{12}"):
        train([*args, f"--bts.experts.math={other}"])
