"""A suite's frame: lines, JSON, the table, and a machine that is not idle."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megabts.benchmark import machine
from megabts.benchmark.machine import BUSY_CORES, cores_used_by_others, describe_machine
from megabts.benchmark.suite import (
    Benchmark,
    Line,
    Results,
    Row,
    Settings,
    choose_benchmarks,
    results_json,
    results_text,
    run_suite,
)
from megabts.benchmark.timing import Measure
from megabts.errors import UsageError, UserError
from tests.tools import RunTool

ROWS = [
    Row("S.fp32.dense_vs_hf", Measure(1.2, 0.01), Line(">=", 1.5), Measure(240, 2), Measure(200, 1), "tokens/s", "HF"),
    Row("S.fp32.bts_peak_gb", Measure(1.1, 0.0), Line("<=", 1.9), unit="GB"),
    Row("M.speed", Measure(7.0, 0.5)),
]


def test_lines() -> None:
    assert Line(">=", 3).holds(3)
    assert not Line(">=", 3).holds(2.99)
    assert Line("<=", 1.3).holds(1.3)
    assert not Line("<=", 1.3).holds(1.31)


def test_json_is_nested_by_names_with_spreads_beside() -> None:
    results = Results("cpu", 1.0, ROWS, [0.01, 0.5])
    assert results_json(results, {"cores": 2}) == {
        "cpu": {
            "S": {
                "fp32": {
                    "dense_vs_hf": 1.2,
                    "dense_vs_hf_spread": 0.01,
                    "dense_vs_hf_ours": 240,
                    "dense_vs_hf_yardstick": 200,
                    "bts_peak_gb": 1.1,
                    "bts_peak_gb_spread": 0.0,
                }
            },
            "M": {"speed": 7.0, "speed_spread": 0.5},
        },
        "scale": 1.0,
        "machine": {"cores": 2},
        "idle": {"cores_used_by_others": [0.01, 0.5], "busy": True},
    }
    assert Results("cpu", 1.0, ROWS, [0.01, 0.0]).missed == ["S.fp32.dense_vs_hf"]
    assert results.missed == Results("cpu", 0.5, ROWS, [0.0]).missed == []  # of what is void no line is missed


def test_the_table_says_what_was_missed_and_that_the_machine_was_busy() -> None:
    table = results_text(Results("cpu", 0.5, ROWS, [0.0, 0.5]), {"cores": 2}).splitlines()
    assert table[0] == "cores 2"
    assert "BUSY" in table[2]
    assert "SCALE 0.5" in table[3]
    first, second, third = table[-3:]
    row = ["1.2", "0.01", ">=", "1.5", "MISSED", "HF"]
    assert first.split() == ["S.fp32.dense_vs_hf", "240", "tokens/s", "200", "tokens/s", *row]
    assert second.split() == ["S.fp32.bts_peak_gb", "1.1", "GB", "0", "<=", "1.9", "holds"]
    assert third.split() == ["M.speed", "7", "0.5"]
    idle = results_text(Results("cpu", 1.0, ROWS, [0.0, BUSY_CORES]), {"cores": 2})
    assert "BUSY" not in idle
    assert "SCALE" not in idle


def test_the_machine_is_described() -> None:
    found = describe_machine()
    assert set(found) == {"cores", "cpu", "memory_gib", "python", "torch", "threads", "commit"}
    assert found["cpu"]


@pytest.fixture
def spinning() -> Iterator[None]:
    """Another program that keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    yield
    process.kill()
    process.wait()


@pytest.mark.alone
@pytest.mark.usefixtures("spinning")
def test_a_busy_machine_is_refused_before_anything_runs() -> None:
    ran: list[Settings] = []
    benchmark = Benchmark("one", lambda settings: ran.append(settings) or ROWS)  # type: ignore[func-returns-value]
    with pytest.raises(UserError, match=r"^other programs use \d+\.\d cores, which makes timings void; .*--busy$"):
        run_suite("cpu", [benchmark], Settings())
    assert not ran
    results = run_suite("cpu", [benchmark], Settings(), busy_allowed=True)
    assert ran == [Settings()]
    assert results.busy
    assert len(results.others) == 2
    assert results.rows == ROWS


def test_our_own_work_does_not_count_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, own = machine._busy_seconds(), machine._own_seconds()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert machine._own_seconds() - own >= 0.25  # both clocks see it, so that it cancels
    assert machine._busy_seconds() - busy >= 0.25
    busy_seconds, own_seconds = iter([100.0, 100.3]), iter([5.0, 5.1])
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy_seconds))
    monkeypatch.setattr(machine, "_own_seconds", lambda: next(own_seconds))
    assert 0.5 < cores_used_by_others(0.2) <= 1.0  # 0.2 seconds of others in 0.2 seconds, or a little more


def test_unknown_benchmarks_and_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"has no such benchmark; use one of preprocess, preprocess-1gb, indexing, loader$"
    ):
        choose_benchmarks("data", "loading")
    assert [benchmark.name for benchmark in choose_benchmarks("data", "loader")] == ["loader"]
    wants = (Benchmark("one", lambda settings: [], needs=("no_such_library",)),)
    monkeypatch.setattr("megabts.benchmark.data.BENCHMARKS", wants)
    with pytest.raises(UserError, match="needs no_such_library: pip install"):
        choose_benchmarks("data")


def test_a_folder_for_profiles_that_cannot_be(run_tool: RunTool) -> None:
    code, out, err = run_tool("benchmark.py", "--suite", "cpu", "--only", "scaling", "--profile", "no/folder/x")
    assert (code, out) == (1, "")
    assert err == "error: --profile no/folder/x cannot be made: No such file or directory; name another folder\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--suite", "nothing"], "invalid choice: 'nothing'"),
        (["--suite", "data", "--only", "x"], "no such benchmark"),
        (["--suite", "data", "--scale", "0"], "--scale 0: give a factor above 0"),
        (["--suite", "data", "--json", "no/folder/x.json"], "there is no folder no/folder"),
        (["--suite", "cpu", "--json", "/"], "--json / is a folder; name a file"),
        (["--suite", "cpu", "--json", "/proc/x"], "--json /proc/x cannot be written: "),
        (["--suite", "data", "--profile", "x"], "--profile means nothing to the data suite"),
        (["--suite", "gpu", "--data", "x"], "--data means nothing to the gpu suite; it is for --suite data"),
        (["--suite", "cpu", "--only", "training", "--plot", "x.png"], "leave out --only training"),
        (["--suite", "cpu", "--plot", "x.jpg"], "--plot x.jpg is no picture's name"),
        (["--suite", "data", "--jsn", "x"], "did you mean --json?"),
        ([], "--suite"),
    ],
)
def test_wrong_usage_is_one_line(run_tool: RunTool, flags: list[str], message: str) -> None:
    code, out, err = run_tool("benchmark.py", *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
