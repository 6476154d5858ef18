"""What a benchmark is, how a suite of them is run, and its results as a table and as JSON.

A suite is a module `megabts.benchmark.NAME` with a tuple `BENCHMARKS`. A benchmark is a function from `Settings` to
`Row`s; each row is a measured number that has a place in the JSON:

    {"data": {"preprocess_vs_per_document": 5.1, "preprocess_vs_per_document_spread": 0.1,
              "preprocess_vs_per_document_ours": 21.0, "preprocess_vs_per_document_yardstick": 4.1, ...},
     "machine": {"cores": 2, "cpu": ..., "torch": ..., "commit": ...}, "idle": {"cores_used_by_others": [...], ...}}

To add a suite: write the module, and name it in `SUITES`.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megabts.benchmark.machine import BUSY_CORES, cores_used_by_others
from megabts.benchmark.timing import Measure
from megabts.errors import UsageError, UserError

SUITES = ("cpu", "data", "gpu")


@dataclass(frozen=True)
class Settings:
    """What the command line says about how to measure."""

    data: Path | None = None
    """JSON lines to measure on, in place of the built-in corpora."""
    tokenizer: str = ""
    """As `build_tokenizer` reads it; empty: one is trained on the text."""
    scale: float = 1.0
    """Amounts of data are multiplied by it; lines are only meant for 1."""
    progress: Callable[[str], None] = lambda line: None
    profile: Path | None = None
    """Folder for a profile of each contestant's round; None: none is taken."""


@dataclass(frozen=True)
class Line:
    """What a number has to reach."""

    sign: str
    """">=" or "<="."""
    bound: float

    def holds(self, value: float) -> bool:
        """Whether a value is on the right side."""
        assert self.sign in (">=", "<=")
        return value >= self.bound if self.sign == ">=" else value <= self.bound


@dataclass(frozen=True)
class Row:
    """One number of the results: a ratio of ours to a yardstick, or (without yardstick) a figure of ours."""

    name: str
    """Place in the suite's JSON, such as `S.fp32.dense_vs_hf`."""
    value: Measure
    line: Line | None = None
    ours: Measure | None = None
    yardstick: Measure | None = None
    unit: str = ""
    """Of `ours` and `yardstick`; without a yardstick, of the value too."""
    note: str = ""
    """What the yardstick is."""


@dataclass(frozen=True)
class Benchmark:
    """A measurement that can be asked for by name."""

    name: str
    run: Callable[[Settings], list[Row]]
    needs: tuple[str, ...] = ()
    """Modules of optional libraries without which it cannot run."""
    gpu: bool = False
    """Whether it runs on a GPU alone."""


@dataclass
class Results:
    """What a suite gave."""

    suite: str
    scale: float
    rows: list[Row] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """Cores used by other programs before the first benchmark and after each."""

    @property
    def busy(self) -> bool:
        """Whether other programs were at work, which voids the timings."""
        return max(self.others) > BUSY_CORES

    @property
    def missed(self) -> list[str]:
        """Names of rows that do not hold their line; none where the table says that lines do not count."""
        if self.busy or self.scale != 1:
            return []
        return [row.name for row in self.rows if row.line and not row.line.holds(row.value.median)]


def choose_benchmarks(suite: str, only: str = "") -> list[Benchmark]:
    """The benchmarks of a suite, or the one called `only`.

    Raises UsageError for an unknown name, UserError when a library or a GPU is missing.
    """
    from megabts.runtime.device import gpu_names

    found: Sequence[Benchmark] = importlib.import_module(f"megabts.benchmark.{suite}").BENCHMARKS
    chosen = [benchmark for benchmark in found if only in ("", benchmark.name)]
    if not chosen:
        names = ", ".join(benchmark.name for benchmark in found)
        raise UsageError(f"--only {only}: the {suite} suite has no such benchmark; use one of {names}")
    missing = {module for benchmark in chosen for module in benchmark.needs if not _installed(module)}
    if missing:
        raise UserError(f"the {suite} suite needs {', '.join(sorted(missing))}: pip install -e '.[hf]'")
    if any(benchmark.gpu for benchmark in chosen) and not gpu_names():
        raise UserError(f"the {suite} suite needs an NVIDIA GPU, and torch finds none here; use --suite cpu")
    return chosen


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run_suite(suite: str, benchmarks: Sequence[Benchmark], settings: Settings, busy_allowed: bool = False) -> Results:
    """Run benchmarks one after another, with a look at the machine's load before the first and after each.

    Raises UserError when other programs are at work at the start, unless that is allowed.
    """
    results = Results(suite, settings.scale, others=[cores_used_by_others()])
    if results.busy and not busy_allowed:
        raise UserError(
            f"other programs use {results.others[0]:.1f} cores, which makes timings void; stop them, or measure anyway "
            "with --busy"
        )
    for number, benchmark in enumerate(benchmarks, 1):
        settings.progress(f"{suite} {number}/{len(benchmarks)}: {benchmark.name}")
        results.rows += benchmark.run(settings)
        results.others.append(cores_used_by_others())
    return results


def results_json(results: Results, machine: dict[str, object]) -> dict[str, Any]:
    """All numbers, nested by the dots in their names."""
    tree: dict[str, Any] = {}
    for row in results.rows:
        *path, last = row.name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = row.value.median
        node[f"{last}_spread"] = row.value.spread
        if row.yardstick and row.ours:
            node[f"{last}_ours"], node[f"{last}_yardstick"] = row.ours.median, row.yardstick.median
    idle = {"cores_used_by_others": [round(cores, 3) for cores in results.others], "busy": results.busy}
    return {results.suite: tree, "scale": results.scale, "machine": machine, "idle": idle}


def results_text(results: Results, machine: dict[str, object]) -> str:
    """A table to read, with the machine and its load above it."""
    load = f"cores used by others before and after each benchmark: {', '.join(f'{x:.2f}' for x in results.others)}"
    head = [", ".join(f"{name} {value}" for name, value in machine.items()), load]
    if results.busy:
        head.append("THE MACHINE WAS BUSY: these timings are void")
    if results.scale != 1:
        head.append(f"SCALE {results.scale:g}: too little data for the lines below")
    cells: list[tuple[str, ...]] = [("benchmark", "ours", "yardstick", "value", "spread", "line", "", "")]
    cells += [_cells(row) for row in results.rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([*head, "", *table])


def _cells(row: Row) -> tuple[str, ...]:
    def shown(measure: Measure | None) -> str:
        return f"{measure.median:.4g} {row.unit}".strip() if measure else ""

    value = f"{row.value.median:.4g}" + (f" {row.unit}" if not row.yardstick and row.unit else "")
    line = f"{row.line.sign} {row.line.bound:g}" if row.line else ""
    held = ("holds" if row.line.holds(row.value.median) else "MISSED") if row.line else ""
    return row.name, shown(row.ours), shown(row.yardstick), value, f"{row.value.spread:.2g}", line, held, row.note
