"""Tools as their users call them, in the test's process: another Python with torch takes seconds to start."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
RunTool = Callable[..., tuple[int, str, str]]
"""(name of the file, its arguments) -> (exit code, stdout, stderr)."""


def tool_runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunTool:
    """What the fixture `run_tool` is."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run
