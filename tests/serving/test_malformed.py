"""What cannot be meant is answered with one line of JSON, and leaves the server as it was."""

import json
import re
import socket

import pytest

from tests.serving.malformed import MIB, malformed
from tests.serving.process import ServerProcess


def exchange(server: ServerProcess, sent: bytes, *, end: bool = False) -> tuple[int, bytes]:
    """(status of the last answer, its body) to bytes on a connection of their own."""
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.sendall(sent)
        if end:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
    last = received[received.rindex(b"HTTP/1.1 ") :]
    return int(last[9:12]), last.partition(b"\r\n\r\n")[2]


def check_error(name: str, status: int, body: bytes) -> dict[str, str]:
    """That an answer is a refusal of the interface's form."""
    assert 400 <= status < 500, f"{name}: {status} {body[:200]!r}"
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}, name
    assert isinstance(error["message"], str), name
    assert error["message"], name
    assert "\n" not in error["message"], name
    assert len(error["message"]) < 600, name
    return error


def test_every_malformed_request_is_refused(server: ServerProcess) -> None:
    good = server.complete("abc", max_tokens=4)
    cases = list(malformed())
    assert len(cases) >= 200
    check_error("first", *exchange(server, cases[0][1]))
    before = server.rss()
    for name, sent in cases:
        status, body = exchange(server, sent)
        check_error(name, status, body)
        assert status not in (401, 403), name  # which would be for another reason than meant
    growth = server.rss() - before
    print(f"\n{len(cases)} malformed requests: {growth / MIB:.1f} MiB more")
    assert growth < 20 * MIB
    assert server.complete("abc", max_tokens=4)["choices"] == good["choices"]
    server.wait_for("megabts_running", 0)
    server.wait_for("megabts_waiting", 0)


def test_a_hundred_megabytes(server: ServerProcess) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    before, block = server.rss(), b"a" * MIB
    for framing in (b"Content-Length: %d\r\n\r\n" % (100 * MIB), b"Transfer-Encoding: chunked\r\n\r\n"):
        with socket.create_connection((server.host, server.port), timeout=60) as connection:
            connection.sendall(head + framing)
            for _ in range(100):
                connection.sendall(b"%x\r\n%s\r\n" % (MIB, block) if b"chunked" in framing else block)
            if b"chunked" in framing:
                connection.sendall(b"0\r\n\r\n")
            received = b""
            while part := connection.recv(65536):
                received += part
        error = check_error("100 MB", int(received[9:12]), received.partition(b"\r\n\r\n")[2])
        assert received.startswith(b"HTTP/1.1 413 ")
        assert error["code"] == "request_too_large"
    growth = server.rss() - before
    print(f"\ntwice 100 MiB: {growth / MIB:.1f} MiB more")
    assert growth < 20 * MIB


def test_too_long_a_prompt_names_both_numbers(server: ServerProcess) -> None:
    status, content, _ = server.ask("/v1/completions", {"prompt": "a" * 300, "max_tokens": 4})
    assert status == 400
    assert content["error"]["code"] == "context_length_exceeded"
    assert {"300", "255"} <= set(re.findall(r"\d+", content["error"]["message"]))
    status, content, _ = server.ask("/v1/completions", {"prompt": "a" * 250, "max_tokens": 20})
    assert status == 400
    assert {"250", "20", "256"} <= set(re.findall(r"\d+", content["error"]["message"]))


@pytest.mark.parametrize("name", ["model", "checkpoint", "tokenizer", "adapter", "path"])
def test_no_path_comes_from_a_request(server: ServerProcess, name: str) -> None:
    before = server.complete("abc", max_tokens=4)
    for value in ("/etc/passwd", "../members/hub", "file:///etc/passwd"):
        status, content, _ = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1, name: value})
        assert status == (404 if name == "model" else 400)
        assert content["error"]["param"] == name
    assert server.complete("abc", max_tokens=4)["choices"] == before["choices"]


def test_only_its_own_names_are_answered(server: ServerProcess) -> None:
    for host, status in (
        ("localhost", 200),
        (f"localhost:{server.port}", 200),
        ("a.localhost", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("192.168.1.7:8000", 200),
        ("elsewhere.example", 403),
        (f"localhost.elsewhere.example:{server.port}", 403),
        ("127.0.0.1.elsewhere.example", 403),
        ("[::1", 403),
        ("", 403),
    ):
        assert server.ask("/v1/models", headers={"Host": host})[0] == status, host


def test_messages_name_field_and_value(server: ServerProcess) -> None:
    cases = (
        ({"max_tokens": "many"}, "max_tokens", 'max_tokens is "many"; send a whole number'),
        ({"temperature": 3}, "temperature", "temperature is 3; it must lie in 0..2"),
        ({"colour": 1}, "colour", "there is no field 'colour'; known are "),
        ({"without": ["law"]}, "without", "there is no expert 'law' to leave out; the experts are code, math"),
    )
    for extra, param, message in cases:
        status, content, _ = server.ask("/v1/completions", {"prompt": "a", **extra})
        assert (status, content["error"]["param"]) == (400, param)
        assert content["error"]["message"].startswith(message)
