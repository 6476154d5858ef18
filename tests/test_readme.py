"""README.md and docs keep their word: the README's chain of commands runs as it stands; links, files and flags exist.

The chain is what stands in bash blocks between `<!-- tested: begin -->` and `<!-- tested: end -->`. It runs in a copy
of the repository whose `.venv` is the tests' own Python, in one shell that ends at the first command that fails.
Limit: the real `.venv` is not made here.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megabts.config.load import from_yaml
from megabts.data.indexed import IndexedDataset

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "golden" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LAUNCHERS = {
    "pretrain_seed.sh": "train.py",
    "pretrain_expert.sh": "train.py",
    "train_stitch.sh": "train.py",
    "quickstart.sh": "quickstart.py",
    "compare.sh": "compare.py",
}
FOLDERS = ("megabts", "tools", "examples", "tests", "docs", ".ci")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for named, block in fenced if named == language]


def spans(text: str) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what a clone holds, and an environment to activate in it."""
    root = tmp_path / "megabts clone"
    for folder in ("megabts", "tools", "examples"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    binaries = root / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "python3"):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (binaries / name).chmod(0o755)
    # PYTHONPATH: the copy, not the tree that may be installed in the tests' Python.
    (binaries / "activate").write_text('export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD"\n')
    return root


@pytest.mark.timeout(900)  # some thirty commands, each of which imports torch
def test_readme_chain_runs(repository: Path) -> None:
    parts = re.findall(r"<!-- tested: begin -->(.*?)<!-- tested: end -->", README.read_text(), re.DOTALL)
    script = "\n".join(block for part in parts for block in blocks(part, "bash"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert len(IndexedDataset(repository / "data" / "code_train_text_document")) > 100
    models = {path.parent.parent.name for path in repository.glob("runs/tiny/*/step_*/manifest.json")}
    assert models >= {"seed", "code", "math", "prose", "bts", "bts3", "btx"}
    without = from_yaml((repository / "runs/tiny/bts-without-code/config.yaml").read_text())
    assert sorted(without.bts.experts) == ["math", "prose"]
    rows = [line.split() for line in done.stdout.splitlines()]
    losses = {row[0]: float(row[1]) for row in rows if len(row) == 5 and row[0] in ("code", "math", "prose")}
    assert len(losses) == 3
    assert max(losses.values()) < 7.6  # nats; ln 2048 = 7.62 is knowing nothing
    assert {row[0] for row in rows if row and row[0] == "hub"} == {"hub"}  # the table of --gates


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    missing = [file for file in files if file and not (page.parent / file).exists()]
    assert not missing, f"{page.name} links to {missing}"


def named_paths(text: str) -> Iterator[str]:
    """Files and folders of the repository that code on a page names, also inside a command."""
    code = [*spans(text), *blocks(text, "bash"), *blocks(text, "")]
    for word in re.findall(r"[\w./-]+", "\n".join(code)):
        if word.split("/")[0] in FOLDERS and "/" in word:
            yield word


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_files_exist(page: Path) -> None:
    missing = [path for path in named_paths(page.read_text()) if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names {missing}"


def test_architecture_lists_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    listed = [name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)]
    packages = [path.parent.name for path in (ROOT / "megabts").glob("*/__init__.py")]
    modules = [path.name for path in (ROOT / "megabts").glob("*.py") if path.name not in ("__init__.py", "errors.py")]
    assert sorted(listed) == sorted(packages + modules)
    named = [name for name in re.findall(r"`(\w+/\w+\.py)`", text) if name.split("/")[0] not in FOLDERS]
    missing = [name for name in named if not (ROOT / "megabts" / name).exists()]
    assert not missing


def test_configuration_example_loads() -> None:
    (example,) = blocks((ROOT / "docs" / "configuration.md").read_text(), "yaml")
    assert from_yaml(example).bts.experts == {"code": "runs/code", "math": "runs/math"}


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(tool, flags) of every command on a page that starts a tool, itself or by a launch script."""
    lines = [line for language in ("bash", "") for block in blocks(text, language) for line in joined(block)]
    for line in [*lines, *spans(text)]:
        found = re.search(r"(?:tools|examples)/([\w-]+\.(?:py|sh))(.*)", line)
        if found and (tool := LAUNCHERS.get(found[1], found[1])).endswith(".py"):
            words = shlex.split(found[2].replace("[", " ").replace("]", " "), comments=True)
            yield tool, [word.partition("=")[0] for word in words if word.startswith("--")]


def joined(block: str) -> list[str]:
    """A block's lines, those that end in a backslash joined with the next."""
    return block.replace("\\\n", " ").splitlines()


@cache
def flags_of(tool: str) -> frozenset[str]:
    """Every flag that --help names."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(re.findall(r"--[\w.-]*\w", done.stdout))


def known(flag: str, tool: str) -> bool:
    """Whether the tool has the flag; `--bts.experts.code` is an item of the mapping `--bts.experts`."""
    return ".".join(flag.split(".")[:2]) in flags_of(tool)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_are_the_tools_own(page: Path) -> None:
    unknown = [
        f"{tool} {flag}"
        for tool, flags in commands(page.read_text())
        for flag in flags
        if flag not in ("--help", "--no-venv") and not known(flag, tool)
    ]
    code = "\n".join([*spans(page.read_text()), *blocks(page.read_text(), "bash")])
    unknown += [setting for setting in re.findall(r"--\w+\.\w+", code) if not known(setting, "train.py")]
    assert not unknown, f"{page.name} gives flags that do not exist: {unknown}"


def test_readme_flags_are_seen() -> None:
    found = dict(commands(README.read_text()))
    assert {"preprocess_data.py", "train.py", "stitch.py", "evaluate.py", "generate.py"} <= set(found)
    assert "--append-eod" in found["preprocess_data.py"]
    assert not known("--append-eos", "preprocess_data.py")
    assert not known("--no.such.key", "train.py")
