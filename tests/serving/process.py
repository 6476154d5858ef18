"""tools/serve.py as a process, and plain requests to it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class ServerProcess:
    """A server at a free port; in a `with` block it is ended like a service manager ends it."""

    def __init__(self, checkpoint: Path, *arguments: str, key: str = "", ranks: int = 1) -> None:
        self.key = key
        launcher = (
            ["-m", "megabts.runtime.torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        )
        command = [
            sys.executable,
            *launcher,
            str(ROOT / "tools" / "serve.py"),
            "--checkpoint",
            str(checkpoint),
            "--port",
            "0",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"at http://(\S+):(\d+)$", self.line)
        if found is None:
            raise AssertionError(f"no server: {self.line}{self.process.communicate()[1]}")
        self.host, self.port = found[1], int(found[2])

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def ask(
        self, path: str, content: Any = None, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers) of one request; content that is no bytes is sent as JSON."""
        connection = self.connect()
        body = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        sent = {"Content-Type": "application/json"} if body is not None else {}
        if self.key:
            sent["Authorization"] = f"Bearer {self.key}"
        connection.request(method or ("GET" if body is None else "POST"), path, body, {**sent, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        kind = answer.getheader("Content-Type") or ""
        return (
            answer.status,
            json.loads(text) if "json" in kind else text.decode(),
            {name.lower(): value for name, value in answer.getheaders()},
        )

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The answer to a request for a greedy completion."""
        status, content, _ = self.ask("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        assert status == 200, content
        return content

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        text = self.ask("/metrics")[1]
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])  # type: ignore[index]

    def wait_for(self, name: str, value: float, seconds: float = 10) -> float:
        """Wait until a metric has a value; how long that took."""
        start = time.monotonic()
        while self.metric(name) != value:
            assert time.monotonic() < start + seconds, f"{name} is {self.metric(name)}"
            time.sleep(0.01)
        return time.monotonic() - start

    def rss(self) -> int:
        """Resident memory, bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, float]:
        """(exit code, stderr, seconds) after a signal."""
        start = time.monotonic()
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=30)
        return self.process.returncode, error, time.monotonic() - start

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end()
        self.process.kill()
        self.process.communicate()
