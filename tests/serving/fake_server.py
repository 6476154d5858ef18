"""A server that the page can talk to: the interface's answers, made up, without a model.

What happens depends on the prompt: "busy", "long", "failed", "broken", "cut" fail in their ways, "slow" goes on until
the client leaves. Everything else is read as words, each a token, and answered with ANSWER, or WITHOUT where experts
are left out.
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "megabts" / "serving" / "static" / "index.html"
MEMBERS = ["hub", "code", "math"]
LAYERS = [
    {"index": 0, "kind": "hub_into_experts", "layer": 2},
    {"index": 1, "kind": "experts_into_hub", "layer": 4},
]
MIXTURE = {"index": 2, "kind": "output_mixture", "layer": 4}
ANSWER = [" <img src=x onerror='document.title=1'>", "", " é", "\n", "=1+1", " \u202eabc", "<b>", "\t", ' "end", ']
WITHOUT = [" nothing", " of", " it"]
ERRORS = {
    "busy": (429, "5 completions run or wait, and the server takes 4; try again"),
    "long": (400, "the prompt has 900 tokens, the server takes 512; shorten it"),
    "failed": (500, "the model failed and the server ends; its log says why"),
}


def gates_of(place: int, without: list[str], mixture: bool = False) -> list[list[float | None]]:
    """Made-up gates of the token at this place: in the last layer members lead in turn, in a mixture the last does."""
    members = [member for member in MEMBERS if member not in without]
    first = [None, *(round(0.9 - 0.2 * index - 0.001 * place, 4) for index in range(len(members) - 1))]
    last: list[float | None] = [
        0.6 if index == place % len(members) else 0.4 / (len(members) - 1) for index in range(len(members))
    ]
    output: list[float | None] = [0.2 / (len(members) - 1)] * (len(members) - 1) + [0.8]
    return [first, last, output] if mixture else [first, last]


def leader(place: int, layer: int, without: list[str]) -> str:
    """The member with the largest gate there."""
    row = gates_of(place, without)[layer]
    members = [member for member in MEMBERS if member not in without]
    return max(zip(row, members, strict=True), key=lambda pair: pair[0] or 0)[1]


class FakeServer(ThreadingHTTPServer):
    """Serves the page at `url` in a thread; `bodies` are the completions asked for, `left` is set when one is left."""

    daemon_threads = True

    def __init__(self, method: str = "bts", key: str = "", mixture: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.method, self.key, self.mixture = method, key, mixture
        self.places = [*LAYERS, *([MIXTURE] if mixture else [])] if method == "bts" else []
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: FakeServer

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def answer(self, status: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, json.dumps({"error": {"message": message}}).encode(), Retry_After="3")

    def authorised(self) -> bool:
        if not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self.refuse(401, "the API key is missing or wrong")
        return False

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200, PAGE.read_bytes(), "text/html")
        elif self.path == "/v1/models" and self.authorised():
            bts = self.server.method == "bts"
            about = {"method": self.server.method, "max_tokens": 512, "members": MEMBERS if bts else []}
            model = {"id": "made-up", "megabts": {**about, "gate_places": self.server.places}}
            self.answer(200, json.dumps({"data": [model]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.authorised():
            return
        self.server.bodies.append(body)
        if body["prompt"] in ERRORS:
            self.refuse(*ERRORS[body["prompt"]])
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()

    def tell(self, **choice: Any) -> None:
        self.write(json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": None, **choice}]}))

    def write(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def stream(self, body: dict[str, Any]) -> None:
        without, gates, place = body.get("without", []), body.get("gates", False), 0
        if gates:
            words = re.findall(r"\s*\S+|\s+", body["prompt"])  # as a tokenizer that drops leading blanks shows them
            tokens = [{"text": word.lstrip(" "), **self.gates(True, n, without)} for n, word in enumerate(words)]
            tokens = tokens or [{"text": "<start>", **self.gates(True, 0, without)}]
            self.tell(prompt_tokens=tokens)
            place = len(words)
        for number in range(10_000):
            texts = WITHOUT if without else ANSWER
            text = f" {number}" if body["prompt"] == "slow" else texts[number]
            last = body["prompt"] != "slow" and number == len(texts) - 1
            self.tell(text=text, finish_reason="length" if last else None, **self.gates(gates, place + number, without))
            if body["prompt"] == "broken":
                self.write(json.dumps({"error": {"message": "the server is shutting down"}}))
            if last or body["prompt"] in ("broken", "cut"):
                break
            time.sleep(0.005)
        if body["prompt"] not in ("broken", "cut"):
            self.write("[DONE]")

    def gates(self, wanted: bool, place: int, without: list[str]) -> dict[str, Any]:
        return {"gates": gates_of(place, without, self.server.mixture)} if wanted else {}
