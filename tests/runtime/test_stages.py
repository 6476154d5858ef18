"""Jobs of real processes: order, keeping, staleness, failure and interruption without orphans."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megabts.errors import UsageError, UserError
from megabts.runtime import stages as stages_module
from megabts.runtime.stage_display import last_step
from megabts.runtime.stages import Stage, run_stages


def stage(folder: Path, name: str, script: str, needs: tuple[str, ...] = (), **changes: Any) -> Stage:
    """A stage whose shell script runs in `folder`."""
    return Stage(
        name,
        name.upper(),
        ["sh", "-c", f"cd {folder} && {script}"],
        folder / f"{name}.done",
        needs,
        log=folder / "logs" / f"{name}.log",
        **changes,
    )


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
    return path.read_text().strip()


def gone(pid: int) -> bool:
    """The process has ended (a zombie that nobody reaps counts as ended)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_order_seconds_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = [
        stage(tmp_path, "a", "sleep 0.3; echo a >> order"),
        stage(tmp_path, "b", "echo b >> order", ("a",)),
        stage(tmp_path, "c", "echo c >> order; echo said; echo also >&2"),
    ]
    seconds = run_stages(job, workers=2, threads=2)
    assert (tmp_path / "order").read_text().split() == ["c", "a", "b"]
    assert list(seconds) == ["a", "b", "c"]
    assert 0.3 <= seconds["a"] < 10
    assert (tmp_path / "logs/c.log").read_text() == "said\nalso\n"
    out = capsys.readouterr().out
    assert "A: started\n" in out
    assert "[3/3] B: done (" in out


def test_finished_stages_are_kept_with_their_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = [stage(tmp_path, "a", "echo a >> order"), stage(tmp_path, "b", "echo b >> order", ("a",))]
    first = run_stages(job, workers=1, threads=1)
    assert run_stages(job, workers=1, threads=1) == first
    assert (tmp_path / "order").read_text().split() == ["a", "b"]
    assert "A: kept" in capsys.readouterr().out


def test_markers_without_an_origin_are_judged_by_their_command(tmp_path: Path) -> None:
    job = [stage(tmp_path, "a", "echo a >> order"), stage(tmp_path, "b", "echo b >> order", ("a",))]
    for one in job:
        one.done.write_text(json.dumps({"command": one.command, "seconds": 2.5}))
    assert run_stages(job, workers=1, threads=1) == {"a": 2.5, "b": 2.5}
    assert not (tmp_path / "order").exists()


@pytest.mark.parametrize("damage", ["command", "missing", "garbage"])
def test_stale_stages_and_what_needs_them_run_again(tmp_path: Path, damage: str) -> None:
    def job(script: str) -> list[Stage]:
        return [
            stage(tmp_path, "a", script),
            stage(tmp_path, "b", "echo b >> order", ("a",)),
            stage(tmp_path, "other", "echo other >> order"),
        ]

    run_stages(job("echo a >> order"), workers=1, threads=1)
    (tmp_path / "order").unlink()
    if damage == "missing":
        (tmp_path / "a.done").unlink()
    if damage == "garbage":
        (tmp_path / "a.done").write_text("[")
    run_stages(job("echo new >> order" if damage == "command" else "echo a >> order"), workers=1, threads=1)
    assert (tmp_path / "order").read_text().split() == ["new" if damage == "command" else "a", "b"]


def test_stale_markers_do_not_outlive_a_failed_rerun(tmp_path: Path) -> None:
    dependent = stage(tmp_path, "b", "true", ("a",))
    run_stages([stage(tmp_path, "a", "true"), dependent], workers=1, threads=1)
    with pytest.raises(UserError):
        run_stages([stage(tmp_path, "a", "exit 1"), dependent], workers=1, threads=1)
    assert not (tmp_path / "b.done").exists()


# A tool that refuses to overwrite, and a training that goes on where it stands.
REFUSES = "mkdir made && echo {0} > made/what"
TRAINS = "mkdir -p run && cp made/what run/from.new && ls run >> seen && [ -e go ] && echo trained >> run/log"


def job_of_makers(folder: Path, what: str) -> list[Stage]:
    return [
        stage(folder, "made", REFUSES.format(what), makes=folder / "made"),
        stage(folder, "run", TRAINS, ("made",), makes=folder / "run", resumes=True),
    ]


def test_stages_that_run_again_find_nothing_of_their_own(tmp_path: Path) -> None:
    """A tool killed before its mark, or with other arguments, meets no earlier output; a file goes like a folder."""
    (tmp_path / "go").touch()
    run_stages(job_of_makers(tmp_path, "one"), workers=1, threads=1)
    (tmp_path / "made.done").unlink()
    run_stages(job_of_makers(tmp_path, "one"), workers=1, threads=1)
    run_stages(job_of_makers(tmp_path, "two"), workers=1, threads=1)
    assert (tmp_path / "made/what").read_text() == "two\n"
    file = [stage(tmp_path, "file", "set -C; echo > file", makes=tmp_path / "file")]
    run_stages(file, workers=1, threads=1)
    (tmp_path / "file.done").unlink()
    run_stages(file, workers=1, threads=1)


def test_an_interrupted_run_goes_on_only_while_all_before_it_is_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="RUN failed"):
        run_stages(job_of_makers(tmp_path, "one"), workers=1, threads=1)
    (tmp_path / "run/checkpoint").touch()
    with pytest.raises(UserError, match="RUN failed"):  # the same command: what it has done stands
        run_stages(job_of_makers(tmp_path, "one"), workers=1, threads=1)
    assert (tmp_path / "run/checkpoint").exists()
    (tmp_path / "go").touch()
    run_stages(job_of_makers(tmp_path, "two"), workers=1, threads=1)  # its own command is the same, its need's is not
    assert not (tmp_path / "run/checkpoint").exists()
    assert (tmp_path / "seen").read_text().split() == ["from.new", "checkpoint", "from.new", "from.new"]


def test_a_finished_run_begins_anew_when_what_it_needs_was_made_anew(tmp_path: Path) -> None:
    """Also when that was done by a job without it, which left its marker."""
    (tmp_path / "go").touch()
    run_stages(job_of_makers(tmp_path, "one"), workers=1, threads=1)
    run_stages(job_of_makers(tmp_path, "one"), workers=1, threads=1)
    assert (tmp_path / "run/log").read_text() == "trained\n"
    run_stages(job_of_makers(tmp_path, "two")[:1], workers=1, threads=1)
    assert (tmp_path / "run.done").exists()
    run_stages(job_of_makers(tmp_path, "two"), workers=1, threads=1)
    assert (tmp_path / "run/log").read_text() == "trained\n"
    assert (tmp_path / "run/from.new").read_text() == "two\n"


def test_every_gpu_has_one_stage_at_a_time(tmp_path: Path) -> None:
    script = (
        'echo "+$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS" >> order; sleep 0.1; echo "-$CUDA_VISIBLE_DEVICES" >> order'
    )
    job = [stage(tmp_path, name, script) for name in "abcdef"]
    run_stages(job, workers=8, threads=6, gpus=["2", "GPU-5"])
    busy: set[str] = set()
    used = set()
    for line in (tmp_path / "order").read_text().splitlines():
        gpu, *threads = line[1:].split()
        if line.startswith("-"):
            busy.remove(gpu)
            continue
        assert gpu not in busy
        assert threads == ["3"]
        busy.add(gpu)
        used.add(gpu)
    assert used == {"2", "GPU-5"}


def test_workers_bound_and_exclusive_stages_run_alone(tmp_path: Path) -> None:
    script = 'echo "+{0} $OMP_NUM_THREADS" >> order; sleep 0.15; echo "-{0}" >> order'
    job = [stage(tmp_path, name, script.format(name), exclusive=name == "x") for name in ("a", "b", "c", "x", "d")]
    run_stages(job, workers=2, threads=5)
    running: set[str] = set()
    most = 0
    for line in (tmp_path / "order").read_text().splitlines():
        name, *threads = line[1:].split()
        if line.startswith("-"):
            running.remove(name)
            continue
        running.add(name)
        most = max(most, len(running))
        assert threads == ["5" if name == "x" else "2"]
        assert "x" not in running or len(running) == 1
    assert most == 2


def test_failure_stops_the_others_and_says_where(tmp_path: Path) -> None:
    job = [
        stage(tmp_path, "slow", "sh -c 'echo $$ > slow.pid; sleep 60'; true"),
        stage(tmp_path, "bad", "while ! [ -s slow.pid ]; do sleep 0.02; done; echo; echo 'error: no data'; exit 3"),
    ]
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        run_stages(job, workers=2, threads=2)
    assert str(raised.value) == (f"stage BAD failed: no data; log: {tmp_path}/logs/bad.log; run again to continue")
    assert time.monotonic() - start < 5
    assert gone(int((tmp_path / "slow.pid").read_text()))
    assert not list(tmp_path.glob("*.done"))


def test_what_ignores_sigterm_is_killed_even_in_its_own_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "GRACE", 0.5)
    stubborn = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); "
        "open('pid.tmp', 'w').write(str(os.getpid())); os.rename('pid.tmp', 'pid'); time.sleep(60)"
    )
    job = [
        stage(tmp_path, "stubborn", f'{sys.executable} -c "{stubborn}" & wait'),
        stage(tmp_path, "bad", "while ! [ -s pid ]; do sleep 0.02; done; exit 3"),
    ]
    with pytest.raises(UserError, match="BAD failed: ended with code 3"):
        run_stages(job, workers=2, threads=2)
    assert gone(int((tmp_path / "pid").read_text()))


def test_death_by_signal_and_missing_program_are_failures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="KILLED failed: ended by signal 9"):
        run_stages([stage(tmp_path, "killed", "kill -9 $$")], workers=1, threads=1)
    nothing = Stage("n", "N", ["/no/such/program"], tmp_path / "n.done", log=tmp_path / "n.log")
    with pytest.raises(UserError, match=r"N failed: cannot start /no/such/program"):
        run_stages([nothing], workers=1, threads=1)


JOB = """
import sys
from pathlib import Path
from megabts.errors import run_tool
from megabts.runtime.stages import Stage, run_stages

def main():
    folder = Path(sys.argv[1])
    script = f"cd {folder}; echo $$ > pid.tmp; mv pid.tmp pid; sleep 60"
    run_stages([Stage("a", "A", ["sh", "-c", script], folder / "a.done", log=folder / "a.log")], workers=1, threads=1)

run_tool(main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_the_job_and_its_commands(tmp_path: Path, number: signal.Signals, code: int) -> None:
    job = subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    pid = int(wait_for(tmp_path / "pid"))
    job.send_signal(number)
    _, errors = job.communicate(timeout=20)
    assert job.returncode == code
    assert "Traceback" not in errors
    assert gone(pid)
    assert not (tmp_path / "a.done").exists()


def test_impossible_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs 'b', which is no stage before it"):
        run_stages([stage(tmp_path, "a", "true", ("b",)), stage(tmp_path, "b", "true")], workers=1, threads=1)
    with pytest.raises(UsageError, match="two stages"):
        run_stages([stage(tmp_path, "a", "true"), stage(tmp_path, "a", "true")], workers=1, threads=1)


def test_last_step_of_a_growing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 2001)) + '{"step": 20')
    assert last_step(path) == 2000
    assert last_step(path, since=time.time() + 60) == 0


def test_running_stages_are_reported_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megabts.runtime.stage_display.QUIET", 0.1)
    monkeypatch.setattr("megabts.runtime.stage_display.REFRESH", 0.05)
    script = """echo '{"step": 7}' > metrics.jsonl; sleep 0.6"""
    run_stages([stage(tmp_path, "a", script, metrics=tmp_path, total_steps=9)], workers=1, threads=1)
    assert "running: A (0 s, step 7/9)" in capsys.readouterr().out


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    script = JOB.replace("sleep 60", "sleep 0.2")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    job = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65_536)
        except OSError:  # the terminal's other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert job.wait(timeout=20) == 0
    assert b"all stages" in shown
    assert b"100%" in shown
    assert b"started" not in shown
