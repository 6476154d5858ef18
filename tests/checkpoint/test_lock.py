"""One run per folder."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from megabts.checkpoint.lock import RunLock
from megabts.errors import UserError


def hold(run: Path, held: Event) -> None:
    with RunLock(run):
        held.set()
        time.sleep(60)


def start_holder(run: Path) -> multiprocessing.Process:
    held = multiprocessing.Event()
    process = multiprocessing.Process(target=hold, args=(run, held), daemon=True)
    process.start()
    assert held.wait(30)
    return process


def test_second_run_is_refused_and_a_killed_one_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "new" / "run"
    process = start_holder(run)
    with (
        pytest.raises(UserError, match=f"in use by process {process.pid} on host {socket.gethostname()}"),
        RunLock(run),
    ):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
    with caplog.at_level(logging.WARNING), RunLock(run):
        assert f"left by process {process.pid}" in caplog.text
    process.join()


def test_released_on_exit_and_on_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), RunLock(tmp_path):
            pass
        with pytest.raises(UserError, match=f"process {os.getpid()}"), RunLock(tmp_path):
            pass


def test_other_hosts_are_respected(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"host": "far", "pid": 1, "started": "5"}))
    with pytest.raises(UserError, match=r"process 1 on host far.*delete .*\.lock"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("started", ["1", None])
def test_a_reused_process_id_is_not_the_owner(tmp_path: Path, started: str | None) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["started"] != started
    assert (tmp_path / ".lock").read_text() == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_half_written_lock_is_free(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot lock the run folder"), RunLock(tmp_path / "file"):
        pass
