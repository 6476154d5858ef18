"""tools/plan.py as its users call it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STITCH = ["--config", "examples/configs/paper/stitch.yaml"]


def call(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plan.py", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_table_and_json(tmp_path: Path) -> None:
    done = call(*STITCH, "--gpus", "8", "--gpu", "h200", "--top", "3", "--json", str(tmp_path / "plan.json"))
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert len(figures["ranked"]) == 3
    for number, layout in enumerate(figures["ranked"], 1):
        memory = layout["memory"]
        total = memory.pop("total")
        assert total == pytest.approx(sum(memory.values()))
        assert total < figures["gpu"]["memory"]
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"{number} "))
        assert f"{layout['seconds']:.3f}" in row
        assert f"{total / 1e9:.1f}" in row
    assert "settings: --parallel.tensor" in done.stdout
    assert "2,097,152 tokens a step" in done.stdout


def test_nothing_fits_exits_with_1() -> None:
    done = call("--gpus", "1", "--model.preset", "llama-3-8b", "--precision.dtype", "bfloat16")
    assert done.returncode == 1
    assert "Nothing fits: memory." in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--gpus", "8", "--nodes", "3"],
            "error: --gpus 8 do not divide among --nodes 3; give --nodes that divide them\n",
        ),
        (["--gpus", "8", "--gppu", "h100"], "error: unknown flag --gppu; did you mean --gpu?\n"),
        (["--gpus", "8", "--top", "0"], "error: --top is 0; it must be at least 1\n"),
        (
            ["--gpus", "8", "--parallel.tensor", "5"],
            "error: no layout on 8 GPUs passes the run's checks with --parallel.tensor 5; it may be 1, 2, 4\n",
        ),
        (
            ["--gpus", "8", "--json", "/nowhere/at/all.json"],
            "error: --json /nowhere/at/all.json: there is no folder /nowhere/at; make it, or name another file\n",
        ),
        ([], "error: the following arguments are required: --gpus; see --help\n"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str) -> None:
    done = call(*args)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
