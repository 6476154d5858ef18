"""The conversions of tests/convert with the lowest transformers that setup.py allows, in a process of its own.

The models are made, saved, loaded again and computed by that version. tests/run.sh puts it into .venv.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PINS = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "tests/lowest.txt").read_text(), re.M))
LOWEST = Path(sys.prefix) / "lowest"
TESTS = [
    "test_dense.py::test_there_and_back_is_the_same_bytes",
    "test_dense.py::test_config_is_read_in_either_form",
    "test_folder.py::test_tokenizers_give_the_same_ids_in_transformers",
    "test_moe.py::test_transformers_computes_the_same",
    "test_bts.py::test_transformers_computes_the_same",
]
NEWER = "test_moe.py::test_transformers_computes_the_same[flex_olmo]"
"""Needs a class that the lowest version has not."""
RUN = """
import sys, huggingface_hub, pytest, tokenizers, transformers
print([module.__version__ for module in (huggingface_hub, tokenizers, transformers)], flush=True)
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_pin_is_the_lower_bound() -> None:
    bound = re.search(r'"transformers>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert bound
    assert Version(PINS["transformers"]) == Version(bound[1])


@pytest.mark.skipif(not LOWEST.is_dir(), reason=f"no {LOWEST}: tests/run.sh (without --no-venv) makes it")
def test_conversions() -> None:
    paths = os.pathsep.join([str(LOWEST), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", RUN, *TESTS, "--rootdir", str(ROOT), "--deselect", f"tests/convert/{NEWER}"],
        cwd=ROOT / "tests/convert",
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == str([PINS[name] for name in sorted(PINS)])
