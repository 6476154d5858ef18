"""tools/plan.py as its users call it."""

import json
from pathlib import Path

import pytest

from tests.tools import TOOLS, RunTool

STITCH = ["--config", TOOLS.parent / "examples/configs/paper/stitch.yaml"]


def test_table_and_json(tmp_path: Path, run_tool: RunTool) -> None:
    file = tmp_path / "plan.json"
    code, table, error = run_tool("plan.py", *STITCH, "--gpus", 8, "--gpu", "h200", "--top", 3, "--json", file)
    assert (code, error) == (0, "")
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert len(figures["ranked"]) == 3
    for number, layout in enumerate(figures["ranked"], 1):
        memory = layout["memory"]
        total = memory.pop("total")
        assert total == pytest.approx(sum(memory.values()))
        assert total < figures["gpu"]["memory"]
        row = next(line for line in table.splitlines() if line.startswith(f"{number} "))
        assert f"{layout['seconds']:.3f}" in row
        assert f"{total / 1e9:.1f}" in row
    assert "settings: --parallel.tensor" in table
    assert "2,097,152 tokens a step" in table


def test_nothing_fits_exits_with_1(run_tool: RunTool) -> None:
    model = ("--model.preset", "llama-3-8b", "--precision.dtype", "bfloat16")
    code, table, _ = run_tool("plan.py", "--gpus", 1, *model)
    assert code == 1
    assert "Nothing fits: memory." in table


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
def test_bad_input_is_one_line(run_tool: RunTool, args: list[str], message: str) -> None:
    code, _, error = run_tool("plan.py", *args)
    assert code == 2
    assert error.startswith(message)
    assert error.count("\n") == 1
