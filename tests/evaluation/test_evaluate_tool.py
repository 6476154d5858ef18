"""tools/evaluate.py on every kind of model, and what it says when it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest

from megabts.runtime.metrics import read_metrics
from tests.tools import RunTool
from tests.train.runs import BTS_SETTINGS, MEMBERS, arguments, make_data, shell, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps that validates on two domains, the end of a document left out of the loss."""
    run_dir = tmp_path_factory.mktemp("runs") / "dense"
    valid = json.dumps({name: str(data / f"valid_{name}") for name in ("a", "b")})
    more: dict[str, Any] = {
        "data__valid": valid,
        "train__steps": 2,
        "train__valid_every": 0,
        "data__eod_mask_loss": True,
    }
    assert train(arguments(run_dir, {str(data / "a"): 1.0}, train__valid_samples=100_000, **more)) == 0
    return run_dir


def test_a_run_is_measured_as_it_measured_itself(dense: Path, tmp_path: Path, run_tool: RunTool) -> None:
    code, out, _ = run_tool("evaluate.py", "--checkpoint", dense, "--json", tmp_path / "new/losses.json")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["domain", "a", "b", "average"]
    losses = json.loads((tmp_path / "new/losses.json").read_text())
    (validation,) = read_metrics(dense)[1]
    assert {name: entry["loss"] for name, entry in losses.items()} == pytest.approx(validation["valid"], rel=1e-6)
    assert losses["a"]["bits_per_byte"] > losses["a"]["loss"]  # less than a byte a token, for there are ends


def test_a_stitched_model_and_its_hub(data: Path, tmp_path: Path, run_tool: RunTool) -> None:
    """Stitches that start by leaving the hub alone are measured as the hub itself is, a Hugging Face folder."""
    more: dict[str, Any] = {"bts__start": "hub_preserving", "train__steps": 1, "optimizer__lr": 1e-12}
    assert train(arguments(tmp_path / "bts", {str(data / "ids"): 1.0}, BTS_SETTINGS, **more)) == 0
    results = []
    for checkpoint in (tmp_path / "bts", tmp_path / "bts/step_00000001", MEMBERS / "hub"):
        given: list[str | Path] = [
            "--checkpoint",
            checkpoint,
            "--data",
            f"ids={data / 'ids'}",
            "--seq-length",
            "32",
            "--samples",
            "20",
        ]
        assert run_tool("evaluate.py", *given, "--json", tmp_path / "losses.json")[0] == 0
        results.append(json.loads((tmp_path / "losses.json").read_text())["ids"])
    assert results[0] == results[1]
    without: list[str | Path] = [
        "--checkpoint",
        tmp_path / "bts",
        "--data",
        f"ids={data / 'ids'}",
        "--samples",
        "20",
        "--without",
    ]
    assert run_tool("evaluate.py", *without, "code", "--json", tmp_path / "losses.json")[0] == 0
    assert json.loads((tmp_path / "losses.json").read_text())["ids"]["loss"] == pytest.approx(
        results[0]["loss"], rel=1e-5
    )
    assert results[0]["loss"] == pytest.approx(results[2]["loss"], rel=1e-5)
    assert [entry["tokens"] for entry in results] == [640, 640, 640]
    assert results[0]["bits_per_byte"] is None


def test_what_cannot_be_measured_is_one_line(data: Path, dense: Path, tmp_path: Path, run_tool: RunTool) -> None:
    hub, valid = MEMBERS / "hub", f"v={data / 'valid_a'}"
    (tmp_path / "file").write_text("")
    cases: list[tuple[list[str | Path], int, str]] = [
        (["--checkpoint", tmp_path / "none"], 1, f"there is no folder {tmp_path}/none; give a checkpoint"),
        (["--checkpoint", hub, "--without", "code"], 2, "has no experts; leave out --without code"),
        (["--checkpoint", hub], 2, "the run has no validation sets; give --data DOMAIN=PREFIX"),
        (["--checkpoint", hub, "--data", "v=/nowhere/v"], 1, "dataset /nowhere/v: there is no file /nowhere/v.idx"),
        (["--checkpoint", hub, "--data", valid], 1, "vocabulary of 257, model.vocab_size is 97"),
        (["--checkpoint", dense, "--tokenizer", "null:257"], 1, "was tokenized with bytes"),
        (["--checkpoint", dense, "--data", valid, valid], 2, "two --data have one name; name them DOMAIN=PREFIX"),
        (["--checkpoint", dense, "--samples", "0"], 2, "--samples is 0; it must be at least 1"),
        (["--checkpoint", dense, "--micro-batch", "0"], 2, "--micro-batch is 0; it must be at least 1"),
        (["--checkpoint", dense, "--seq-length", "1000000"], 1, "valid_a"),
        (["--checkpoint", dense, "--json", tmp_path / "file/x.json"], 1, f"--json {tmp_path}/file/x.json cannot be"),
    ]
    for args, code, message in cases:
        found, _, error = run_tool("evaluate.py", *args)
        assert found == code, args
        (line,) = error.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_in_the_shell(dense: Path) -> None:
    done = shell("evaluate.py", ["--checkpoint", str(dense), "--samples", "2"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[0] == "a"
