"""One whole run: the loss falls, everything it should leave is there and reads back, nothing else stays."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megabts.build import load_model
from megabts.checkpoint.manifest import verify
from megabts.config.load import from_yaml, load_config
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.metrics import read_metrics
from megabts.tokenizers.build import build_tokenizer
from tests.train.runs import BTS_SETTINGS, MEMBERS, SEQ, Settings, arguments, build, shell, train

TAGS = {"lm loss", "learning-rate", "grad-norm", "throughput", "iteration-time", "batch-size", "lm loss validation"}


def test_a_run_leaves_what_it_should(data: Path, blend: dict[str, float], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    valid = json.dumps({name: str(data / f"valid_{name}") for name in ("a", "b")})
    settings: dict[str, Any] = {
        "data__valid": valid,
        "train__valid_every": 20,
        "train__steps": 40,
        "checkpoint__every": 15,
    }
    args = arguments(run_dir, blend, logging__tensorboard=True, **settings)
    assert train(args) == 0

    steps, validations = read_metrics(run_dir)
    assert [row["step"] for row in steps] == list(range(1, 41))
    assert steps[0]["loss"] == pytest.approx(5.55, abs=0.3)  # ln 257
    assert steps[-1]["loss"] < steps[0]["loss"] - 2
    assert [row["step"] for row in validations] == [20, 40]
    assert set(validations[-1]["valid"]) == {"a", "b"}
    assert max(validations[-1]["valid"].values()) < 3.5
    assert steps[-1]["consumed_samples"] == 160
    assert steps[-1]["tokens"] == 4 * SEQ

    assert sorted(path.name for path in run_dir.iterdir()) == sorted(
        [".lock", "latest", "metrics.jsonl", "step_00000030", "step_00000040", "tensorboard"]
    )
    assert (run_dir / "latest").read_text() == "step_00000040\n"
    folder = run_dir / "step_00000040"
    manifest = verify(folder)
    assert set(manifest.files) == {
        "config.yaml", "model.safetensors", "optimizer.safetensors", "tokenizer/tokenizer_spec.json"
    }  # fmt: skip
    assert manifest.state["step"] == 40
    assert manifest.state["consumed_samples"] == 160
    assert from_yaml((folder / "config.yaml").read_text()) == load_config(args)
    assert build_tokenizer(folder / "tokenizer").fingerprint == manifest.state["tokenizer_fingerprint"]

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) > TAGS | {"expert_loss/a", "expert_loss/b", "lm loss vs samples"}
    assert [event.step for event in events.Scalars("lm loss")] == list(range(1, 41))
    assert events.Scalars("lm loss")[-1].value == pytest.approx(steps[-1]["loss"])

    loaded = load_model(run_dir, ParallelMesh(), None, "cpu")
    weights = load_file(folder / "model.safetensors")
    assert {name for name, _, _ in loaded.model.own_parameters()} == set(weights)
    assert all(torch.equal(p, weights[name]) for name, p, _ in loaded.model.own_parameters())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_without_a_folder_nothing_is_written(
    blend: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(arguments("", blend, train__steps=2)) == 0
    assert list(tmp_path.iterdir()) == []
    assert "step 2/2 | loss" in capsys.readouterr().out


def test_progress_in_the_shell(blend: dict[str, float], tmp_path: Path) -> None:
    """Into a pipe the progress bar becomes ten lines; the settings that are not defaults come first."""
    done = shell("train.py", arguments(tmp_path / "run", blend, train__steps=30, logging__progress=True))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert any(line.startswith("model.hidden_size: 32") and "(default 64)" in line for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        f"{step}/30" for step in (1, *range(3, 31, 3))
    ]
    assert lines[-1] == f"saved {tmp_path / 'run' / 'step_00000030'}"


def test_a_step_of_masked_tokens_alone_changes_nothing_but_the_count(
    blend: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megabts.data.loader import Loader

    whole = Loader.read

    def masked(self: Loader, first: int, count: int) -> object:
        batch = whole(self, first, count)
        batch.loss_mask[:] = 0
        return batch

    monkeypatch.setattr(Loader, "read", masked)
    assert train(arguments(tmp_path / "run", blend, train__steps=1)) == 0
    assert read_metrics(tmp_path / "run")[0][0]["loss"] == 0.0


def test_gradient_accumulation_is_one_big_batch(blend: dict[str, float], tmp_path: Path) -> None:
    losses = {}
    for micro in (1, 2, 4):
        assert train(arguments(tmp_path / str(micro), blend, train__micro_batch=micro, train__steps=6)) == 0
        losses[micro] = [row["loss"] for row in read_metrics(tmp_path / str(micro))[0]]
    assert losses[1] == pytest.approx(losses[4], rel=1e-5)
    assert losses[2] == pytest.approx(losses[4], rel=1e-5)


def test_frozen_parameters_stay_bit_for_bit(blend: dict[str, float], tmp_path: Path) -> None:
    scales = json.dumps({"layers.0.*": 0})
    args = arguments(tmp_path / "run", blend, optimizer__lr_scale=scales, train__steps=3)
    start = {name: p.detach().clone() for name, p, _ in build(args).model.own_parameters()}
    assert train(args) == 0
    end = load_file(tmp_path / "run/step_00000003/model.safetensors")
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert same == {name for name in start if name.startswith("layers.0.")}


ROUTING_SETTINGS: dict[str, Any] = {
    **{name: value for name, value in BTS_SETTINGS.items() if not name.startswith("bts.")},
    "method": "routing",
    "routing.members": json.dumps({name: str(MEMBERS / name) for name in ("hub", "code", "math")}),
}


@pytest.mark.parametrize("settings", [BTS_SETTINGS, ROUTING_SETTINGS], ids=["bts", "routing"])
def test_frozen_members_in_bfloat16(settings: Settings, data: Path, tmp_path: Path) -> None:
    """The losses of the run in float32, within bfloat16; the model comes back as it ran, or as asked for."""
    losses = {}
    for frozen in ("same", "bfloat16"):
        args = arguments(tmp_path / frozen, {str(data / "ids"): 1.0}, settings, precision__frozen=frozen)
        assert train(args) == 0
        losses[frozen] = [row["loss"] for row in read_metrics(tmp_path / frozen)[0]]
    assert losses["bfloat16"] == pytest.approx(losses["same"], rel=5e-3)
    assert losses["bfloat16"] != losses["same"]
    exact = load_file(tmp_path / "bfloat16/step_00000012/model.safetensors")
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    as_run, asked = (
        load_model(tmp_path / "bfloat16", ParallelMesh(), dtype, "cpu").model for dtype in (None, torch.float32)
    )
    assert (as_run.dtype, asked.dtype) == (torch.bfloat16, torch.float32)
    for name, parameter, _ in as_run.own_parameters():
        assert torch.equal(parameter, exact[name])
