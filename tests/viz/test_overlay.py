"""Curves on one another: distances by hand, a picture, and words for what cannot be compared."""

import json
from pathlib import Path

import pytest

from megabts.errors import UserError
from megabts.runtime.metrics import FILE_NAME
from megabts.viz.overlay import draw_overlay, largest_difference, read_losses
from tests.tools import RunTool


def run(folder: Path, losses: dict[int, float]) -> Path:
    folder.mkdir()
    rows = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items()]
    (folder / FILE_NAME).write_text("".join(rows))
    return folder


def test_distances_are_relative_and_over_common_steps(tmp_path: Path) -> None:
    runs = {"a": run(tmp_path / "a", {1: 4.0, 2: 2.0}), "b": run(tmp_path / "b", {2: 2.2, 3: 9.0})}
    assert largest_difference(read_losses(runs)) == pytest.approx({"b": 0.1})


def test_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    runs = {"a": run(tmp_path / "a", {1: 4.0}), "b": run(tmp_path / "b", {2: 2.2})}
    with pytest.raises(UserError, match=r"b has no step that .*a has"):
        read_losses(runs)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw_overlay({"a": {1: 4.0, 2: 3.0}, "b": {1: 4.0, 2: 3.00001}}, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert text.count("<path") > 10


def test_the_tool_says_how_far_runs_are(tmp_path: Path, run_tool: RunTool) -> None:
    folders = [run(tmp_path / name, {1: loss}) for name, loss in (("a", 2.0), ("b", 2.5))]
    one = ["plot_losses.py", "--out", tmp_path / "out/x.png", "--run", f"first={folders[0]}"]
    code, said, error = run_tool(*one, "--run", f"second={folders[1]}")
    assert code == 0, error
    assert "second: at most 2.5e-01 from first" in said
    assert (tmp_path / "out/x.png").stat().st_size > 5000
    code, _, error = run_tool(*one)
    assert code == 2
    assert error == "error: --run is needed at least twice, with different names; give --run NAME=DIR\n"
