"""tools/serve.py as a process: where it listens, how it ends, and what it says when it cannot."""

import importlib.util
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.inference.test_row_gates import flat
from tests.serving.process import ServerProcess
from tests.serving.tiny import SIZES, write_dense, write_stitched
from tests.tools import RunTool


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that may go on for longer than a server takes to end."""
    return write_dense(tmp_path_factory.mktemp("long") / "run" / "step_00000007", 0, replace(SIZES, max_seq_len=16384))


def lines(server: ServerProcess, max_tokens: int) -> Iterator[str]:
    """Of a stream."""
    connection = server.connect()
    body = {"prompt": "abc", "temperature": 0, "max_tokens": max_tokens, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.strip():
            yield line.decode().strip()


def test_a_signal_lets_requests_finish_and_ends_with_0(checkpoint: Path) -> None:
    with ServerProcess(checkpoint) as server:
        assert server.host == "127.0.0.1"
        stream = lines(server, 40)
        assert next(stream).startswith("data: ")
        server.process.send_signal(15)
        rest = list(stream)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        _, error = server.process.communicate(timeout=30)
        assert (server.process.returncode, error) == (0, "")


@pytest.mark.alone
def test_what_takes_too_long_is_cut_when_the_server_ends(long_model: Path) -> None:
    with ServerProcess(long_model, "--max-rows", "2", "--queue", "1") as server:
        assert "serving run (dense) at http://127.0.0.1:" in server.line  # the run's name, not the checkpoint's
        assert server.ask("/v1/completions", {"prompt": "a", "gates": True})[1]["error"]["param"] == "gates"
        assert server.ask("/v1/completions", {"prompt": "a", "without": ["code"]})[0] == 400
        with socket.socket() as other:  # the port is not to be had
            assert other.connect_ex((server.host, server.port)) == 0
        stream = lines(server, 16000)
        next(stream)
        start = time.monotonic()
        server.process.send_signal(15)
        last = list(stream)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        _, error = server.process.communicate(timeout=30)
        seconds = time.monotonic() - start
        print(f"\nended {seconds:.2f} s after the signal")
        assert (server.process.returncode, error) == (0, "")
        assert 2.5 < seconds < 5


@pytest.mark.reliability
def test_two_ranks_answer_as_one(server: ServerProcess, checkpoint: Path) -> None:
    asked = {"max_tokens": 12, "gates": True}
    expected = server.complete("def add(a, b):", **asked)["choices"][0]
    with ExitStack() as stack:
        pairs = [
            stack.enter_context(ServerProcess(checkpoint, f"--parallel.{axis}", "2", ranks=2))
            for axis in ("tensor", "expert")
        ]
        time.sleep(6)  # longer than a heartbeat
        for pair in pairs:
            found = pair.complete("def add(a, b):", **asked)["choices"][0]
            assert found["text"] == expected["text"]
            for one, two in zip(found["tokens"], expected["tokens"], strict=True):
                assert flat(one["gates"]) == pytest.approx(flat(two["gates"]), abs=1e-3)
            status, content, _ = pair.ask("/v1/completions", {"prompt": "a", "without": ["code"]})
            assert (status, content["error"]["param"]) == (400, "without")
            ranks = children(pair.process.pid)
            assert len(ranks) == 2
            code, error, _ = pair.end()
            assert code == 0
            assert "Traceback" not in error
            assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_it_listens_on_this_machine_alone(server: ServerProcess) -> None:
    inodes = {link.readlink().name for link in Path(f"/proc/{server.process.pid}/fd").iterdir() if link.is_symlink()}
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    assert listening == [f"0100007F:{server.port:04X}"]


def test_a_failed_model_ends_the_server_with_one_line(tmp_path: Path) -> None:
    damaged = write_stitched(tmp_path / "damaged", damage=float("nan"))
    with ServerProcess(damaged) as server:
        assert server.ask("/health")[1] == {"status": "ok"}
        status, content, _ = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 4})
        assert (status, content["error"]["code"]) == (500, "engine_failed")
        status, content, _ = server.ask("/health")
        assert (status, content["status"]) == (503, "failed")
        _, error = server.process.communicate(timeout=30)
        assert server.process.returncode == 1
        assert error.count("\n") == 1
        assert error.startswith("error: the model failed while it served, and the server ended: the model's logits are")


def test_a_port_in_use_is_one_line(run_tool: RunTool, server: ServerProcess, checkpoint: Path) -> None:
    code, out, error = run_tool("serve.py", "--checkpoint", str(checkpoint), "--port", str(server.port))
    assert (code, out, error.count("\n")) == (1, "", 1)
    assert re.match(rf"error: cannot serve at 127.0.0.1 port {server.port}: Address already in use; choose", error)


def test_a_missing_extra_is_one_line_and_help_needs_none(
    run_tool: RunTool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fastapi" else find(name, *rest)
    )
    code, _, error = run_tool("serve.py", "--checkpoint", str(checkpoint))
    assert (code, error) == (1, "error: serving needs fastapi; pip install -e '.[serve]'\n")
    code, out, _ = run_tool("serve.py", "--help")
    assert code == 0
    assert "--max-rows" in out


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "the following arguments are required: --checkpoint"),
        (["--checkpoint", "absent"], 1, "there is no folder absent"),
        (["--checkpoint", "absent", "--port", "70000"], 2, "--port is 70000; ports end at 65535"),
        (["--checkpoint", "absent", "--max-rows", "0"], 2, "--max-rows is 0; it must be at least 1"),
        (["--checkpoint", "absent", "--max-row", "1"], 2, "unknown flag --max-row; did you mean --max-rows?"),
        (["--checkpoint", "absent", "--parallel.tensor", "2"], 2, "start 2 with torchrun"),
        (["--checkpoint", "absent", "--api-key-file", "absent"], 1, "--api-key-file absent cannot be read"),
        (["--checkpoint", "absent", "--api-key", "a b"], 1, "the API key has a space"),
        (["--checkpoint", "absent", "--host", "no.such.host.invalid"], 1, "cannot serve at no.such.host.invalid"),
    ],
)
def test_errors_are_one_line(run_tool: RunTool, arguments: list[str], code: int, message: str) -> None:
    found, _, error = run_tool("serve.py", *arguments, *(["--port", "0"] if "--port" not in arguments else []))
    assert found == code
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_limits_are_the_flags(run_tool: RunTool, checkpoint: Path) -> None:
    code, _, error = run_tool("serve.py", "--checkpoint", str(checkpoint), "--port", "0", "--max-tokens", "1")
    assert (code, error) == (2, "error: --max-tokens is 1; a prompt and a completion need 2 at least\n")
