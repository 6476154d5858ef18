"""The experiments' scripts answer mistakes and --help before anything is installed."""

import subprocess
from pathlib import Path

import pytest

from megabts.experiment.methods import METHODS
from megabts.experiment.scale import preset_names

EXAMPLES = Path(__file__).parents[1] / "examples"
ABLATIONS = "--methods leaves out what --ablations adds; give one of them"
NO_DATA = "there is no folder /nowhere; --data takes a folder of DOMAIN/train.jsonl[.gz] and valid"


@pytest.mark.parametrize(
    "script, arguments, code, shown",
    [
        ("quickstart.sh", ["--novenv"], 2, "error: unknown flag --novenv; see --help\n"),
        ("quickstart.sh", ["--minute", "3"], 2, "error: unknown flag --minute; did you mean --minutes?\n"),
        ("quickstart.sh", ["--minutes", "0"], 2, "error: --minutes is 0; it must be above 0\n"),
        ("quickstart.sh", ["--seed", "-1"], 2, "error: --seed is -1; it must be at least 0\n"),
        ("quickstart.sh", ["--data", "/nowhere"], 1, f"error: {NO_DATA}\n"),
        ("quickstart.sh", ["--help"], 0, ""),
        ("compare.sh", ["--seeds", "0,0"], 2, "error: --seeds 0,0 is not a list of different numbers like 0,1,2\n"),
        ("compare.sh", ["--minutes=-1"], 2, "error: --minutes is -1; it must be above 0\n"),
        (
            "compare.sh",
            ["--methods", "bts,bt"],
            2,
            f"error: --methods names bt, which is none of {', '.join(METHODS)}\n",
        ),
        ("compare.sh", ["--methods", "bts", "--ablations"], 2, f"error: {ABLATIONS}\n"),
        ("compare.sh", ["--preset", "no"], 2, f"error: --preset no is none of {', '.join(preset_names())}\n"),
        ("compare.sh", ["--data", "/nowhere"], 1, f"error: {NO_DATA}\n"),
        ("compare.sh", ["--help"], 0, ""),
    ],
)
def test_mistakes_install_nothing(script: str, arguments: list[str], code: int, shown: str) -> None:
    done = subprocess.run(["bash", str(EXAMPLES / script), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr == shown
    assert "environment:" not in done.stdout
    assert ("--minutes" in done.stdout) == (code == 0)
