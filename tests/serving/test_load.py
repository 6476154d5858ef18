"""Many clients at a time, slow ones, and those that go away."""

import contextlib
import json
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.process import ServerProcess
from tests.serving.test_malformed import check_error

CLIENTS = 32
PROMPTS = [f"{'line ' * (number % 5)}number {number} of" for number in range(CLIENTS)]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def answers_under_load(server: ServerProcess, requests_each: int, max_tokens: int) -> list[float]:
    """Seconds of every request of 32 clients at once; each answer is the one that the request alone has."""
    alone = {prompt: server.complete(prompt, max_tokens=max_tokens)["choices"][0]["text"] for prompt in PROMPTS}

    def client(first: int) -> list[float]:
        seconds = []
        for number in range(first, first + requests_each):
            prompt, start = PROMPTS[number % CLIENTS], time.perf_counter()
            (choice,) = server.complete(prompt, max_tokens=max_tokens)["choices"]
            seconds.append(time.perf_counter() - start)
            assert choice["text"] == alone[prompt]
        return seconds

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [second for seconds in pool.map(client, range(CLIENTS)) for second in seconds]


def tell(what: str, seconds: list[float]) -> None:
    """Print percentiles, for the documents."""
    ranked = statistics.quantiles(seconds, n=100)
    print(f"\n{what}: {len(seconds)} requests, p50 {ranked[49]:.3f} s, p99 {ranked[98]:.3f} s")


def test_answers_of_many_clients_are_those_of_one(server: ServerProcess) -> None:
    tell("32 clients", answers_under_load(server, 2, 6))


@pytest.mark.reliability
def test_many_clients_in_full(server: ServerProcess) -> None:
    tell("32 clients", answers_under_load(server, 20, 16))


def slow_clients(server: ServerProcess, stop: threading.Event, count: int) -> list[tuple[float, bytes]]:
    """(seconds until it was hung up on, what it was told) of clients that send a byte a second, or nothing at all."""
    body = b'{"prompt": "a"' + b" " * 1000
    sent = (b"", HEAD, HEAD + b"Content-Length: 1000\r\n\r\n" + body[:10])

    def client(number: int) -> tuple[float, bytes]:
        start, received = time.monotonic(), b""
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(sent[number % 3])
            connection.settimeout(1)
            while not stop.is_set():
                try:
                    part = connection.recv(4096)
                    received += part
                    if not part:
                        break
                except TimeoutError:
                    with contextlib.suppress(ConnectionError):  # hung up on just now; what it was told is still there
                        if number % 3 == 2:
                            connection.sendall(b" ")
                        elif number % 2:
                            connection.sendall(b"x")
        return time.monotonic() - start, received

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(client, range(count)))


@pytest.mark.alone
def test_slow_clients_hold_nobody_up(server: ServerProcess) -> None:
    def usual() -> float:
        seconds = []
        for _ in range(25):
            start = time.perf_counter()
            server.complete("abc", max_tokens=8)
            seconds.append(time.perf_counter() - start)
        return min(seconds)  # other programs on the machine make some of them slower

    before, stop = usual(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(slow_clients, server, stop, 50)
        time.sleep(2)
        beside = usual()
        try:
            ended = slow.result(timeout=40)
        finally:
            stop.set()
    before = max(before, usual())
    longest = max(seconds for seconds, _ in ended)
    print(f"\n50 slow clients, gone after {longest:.1f} s: a request takes {beside:.3f} s, {before:.3f} s without them")
    assert beside < 2 * before
    for seconds, received in ended:
        assert 9 < seconds < 20
        check_error("slow", int(received[9:12]), received.partition(b"\r\n\r\n")[2])
        assert received.startswith(b"HTTP/1.1 408 ") or b"x" in received


def begin(server: ServerProcess, **fields: object) -> socket.socket:
    """A connection on which a request of 240 tokens was sent."""
    content = json.dumps({"prompt": "abc", "max_tokens": 240, "temperature": 0, **fields}).encode()
    connection = socket.create_connection((server.host, server.port), timeout=30)
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_completion(server: ServerProcess, stream: bool) -> None:
    tokens, cancelled = (server.metric(f"megabts_{name}_total") for name in ("completion_tokens", "cancelled"))
    connection = begin(server, stream=stream)
    server.wait_for("megabts_running", 1)
    if stream:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    connection.close()
    seconds = server.wait_for("megabts_running", 0)
    made = server.metric("megabts_completion_tokens_total") - tokens
    print(f"\nends {seconds:.3f} s after its client, at token {made:.0f} of 240")
    assert server.metric("megabts_cancelled_total") - cancelled == 1
    assert made < 200


def test_a_full_server_says_when_to_come_again(server: ServerProcess) -> None:
    streams = [begin(server, stream=True, n=32) for _ in range(2)]
    server.wait_for("megabts_running", 32)
    server.wait_for("megabts_waiting", 32)
    status, content, headers = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert (status, headers["retry-after"], content["error"]["code"]) == (429, "1", "queue_full")
    assert content["error"]["message"].startswith("64 completions run or wait, and the server takes 64")
    for stream in streams:
        stream.close()
    server.wait_for("megabts_running", 0)
    assert server.complete("a", max_tokens=1)


def test_a_kept_connection_answers_again(server: ServerProcess) -> None:
    connection = server.connect()

    def ask(body: bytes) -> int:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status

    good = b'{"prompt": "a", "max_tokens": 1}'
    assert [ask(body) for body in (good, b"{", good, b'{"prompt": 1}', good)] == [200, 400, 200, 400, 200]
    connection.close()
