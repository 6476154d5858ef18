"""examples/quickstart.sh answers mistakes and --help before anything is installed."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.sh"


@pytest.mark.parametrize(
    "arguments, code, shown",
    [
        (["--novenv"], 2, "error: unknown flag --novenv; see --help\n"),
        (["--minute", "3"], 2, "error: unknown flag --minute; did you mean --minutes?\n"),
        (["--minutes", "0"], 2, "error: --minutes is 0; it must be above 0\n"),
        (["--seed", "-1"], 2, "error: --seed is -1; it must be at least 0\n"),
        (["--help"], 0, ""),
    ],
)
def test_mistakes_install_nothing(arguments: list[str], code: int, shown: str) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr == shown
    assert "environment:" not in done.stdout
    assert ("--minutes" in done.stdout) == (code == 0)
