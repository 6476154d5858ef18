"""Two hundred requests that cannot be meant, as (what it is, bytes on the wire)."""

import json
from collections.abc import Iterator
from typing import Any

MIB = 2**20
NUMBERS = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "n", "seed", "logprobs")
WRONG_NUMBERS: tuple[Any, ...] = (-1, 1e9, "1", [], {}, True, 10**30)
BAD_JSON = (
    b"",
    b"{",
    b"}",
    b"null",
    b"[]",
    b"3",
    b'"text"',
    b"{'prompt': 'a'}",
    b'{"prompt": "a",}',
    b'{"prompt": "a"} trailing',
    b'{"prompt": "a" "n": 1}',
    b'{"prompt": "unterminated',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "max_tokens": 0x10}',
    b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "a\x00b"}',
    b'\x00{"prompt": "a"}',
    b"\xef\xbb\xbf" + b'{"prompt": "a"}',
    b'{"prompt": "a"}'.decode().encode("utf-16"),
    b"\x1f\x8b\x08\x00" + b"\0" * 40,
    b"prompt=a&max_tokens=3",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"prompt": ' + b"[" * 30 + b"]" * 30 + b"}",
    b'{"prompt": "a", "metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}",
)
BAD_VALUES: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": None},
    {"prompt": 3},
    {"prompt": {}},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": ["a", 1]},
    {"prompt": [1, "a"]},
    {"prompt": [1.5]},
    {"prompt": [True]},
    {"prompt": [-1]},
    {"prompt": [257]},
    {"prompt": [10**30]},
    {"prompt": [[1], [300]]},
    {"prompt": [["a"]]},
    {"prompt": "a\0b"},
    {"prompt": ["a", "\0"]},
    {"prompt": "\ud800"},
    {"prompt": "a" * 300},
    {"prompt": "a" * 250, "max_tokens": 7},
    {"prompt": "a", "max_tokens": 0},
    {"prompt": "a", "max_tokens": 256},
    {"prompt": "a", "max_tokens": 1.5},
    {"prompt": "a", "temperature": 2.1},
    {"prompt": "a", "top_p": 0},
    {"prompt": "a", "top_p": 1.01},
    {"prompt": "a", "n": 0},
    {"prompt": "a", "n": 65},
    {"prompt": ["a"] * 65},
    {"prompt": "a", "logprobs": 21},
    {"prompt": "a", "stop": ""},
    {"prompt": "a", "stop": ["x", ""]},
    {"prompt": "a", "stop": ["x"] * 17},
    {"prompt": "a", "stop": 3},
    {"prompt": "a", "stop": {"a": 1}},
    {"prompt": "a", "stop": [None]},
    {"prompt": "a", "stop": "\0"},
    {"prompt": "a", "stream": "yes"},
    {"prompt": "a", "stream": 1},
    {"prompt": "a", "stream_options": {"include_usage": True}},
    {"prompt": "a", "stream": True, "stream_options": 1},
    {"prompt": "a", "stream": True, "stream_options": {"colour": 1}},
    {"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}},
    {"prompt": "a", "model": "other"},
    {"prompt": "a", "model": 3},
    {"prompt": "a", "model": ""},
    {"prompt": "a", "model": "../../etc/passwd"},
    {"prompt": "a", "model": "x" * 100_000},
    {"prompt": "a", "checkpoint": "/etc"},
    {"prompt": "a", "tokenizer": "bytes"},
    {"prompt": "a", "lora": "x"},
    {"prompt": "a", "echo": True},
    {"prompt": "a", "best_of": 2},
    {"prompt": "a", "suffix": "end"},
    {"prompt": "a", "logit_bias": {"5": 1}},
    {"prompt": "a", "presence_penalty": 0.5},
    {"prompt": "a", "frequency_penalty": "0"},
    {"prompt": "a", "gates": "yes"},
    {"prompt": "a", "gates": 1},
    {"prompt": "a", "without": ["law"]},
    {"prompt": "a", "without": "hub"},
    {"prompt": "a", "without": ["code", "math"]},
    {"prompt": "a", "without": [["code"]]},
    {"prompt": "a", "without": {"code": 1}},
    {"prompt": "a", "Prompt": "b"},
    {"prompt": "a", "": 1},
    {"prompt": "a", "messages": []},
    {"prompt": "a", "x" * 100_000: 1},
    {"prompt": "a", "temperature\0": 1},
)
BAD_CHATS: tuple[dict[str, Any], ...] = (
    {},
    {"messages": None},
    {"messages": "Hello"},
    {"messages": []},
    {"messages": ["Hello"]},
    {"messages": [[]]},
    {"messages": [{}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"content": "a"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "user", "content": []}]},
    {"messages": [{"role": "user", "content": ["a"]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": "a\0"}]},
    {"messages": [{"role": "tool", "content": "a"}]},
    {"messages": [{"role": ["user"], "content": "a"}]},
    {"messages": [{"role": "user", "content": "a", "tool_calls": []}]},
    {"messages": [{"role": "user", "content": "a" * 300}]},
    {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
    {"messages": [{"role": "user", "content": "a"}], "logprobs": 2},
    {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 1},
    {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
    {"messages": [{"role": "user", "content": "a"}], "gates": True},
    {"messages": [{"role": "user", "content": "a"}], "prompt": "a"},
    {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ x }}"},
)
BAD_ROUTES = (
    ("GET", "/v1/completions"),
    ("PUT", "/v1/completions"),
    ("DELETE", "/v1/models"),
    ("PATCH", "/v1/chat/completions"),
    ("OPTIONS", "/v1/completions"),
    ("TRACE", "/"),
    ("BREW", "/v1/completions"),
    ("POST", "/"),
    ("POST", "/health"),
    ("POST", "/metrics"),
    ("GET", "/v1"),
    ("GET", "/v1/models/../../etc/passwd"),
    ("GET", "/v1/models/%2e%2e%2fetc%2fpasswd"),
    ("GET", "/v1/models/other"),
    ("GET", "/static/../../../etc/passwd"),
    ("GET", "//etc/passwd"),
    ("GET", "/v1/completions/"),
    ("GET", "/%00"),
    ("GET", "/%ff%fe"),
    ("GET", "/" + "a" * 5000),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/embeddings"),
    ("GET", "http://elsewhere.example/v1/other"),
)
GOOD = b'{"prompt": "a", "max_tokens": 1}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
BAD_WIRE = (
    POST + b"Content-Length: -5\r\n\r\n" + GOOD,
    POST + b"Content-Length: abc\r\n\r\n" + GOOD,
    POST + b"Content-Length: 1e3\r\n\r\n" + GOOD,
    POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + GOOD,
    POST + b"Content-Length: 10\r\n\r\n" + GOOD,  # the rest is no request
    POST + b"Content-Length: 99999999999999999999\r\n\r\n" + GOOD,
    POST + b"Content-Length: 5000000\r\n\r\n" + b" " * 100,
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD,
    POST + b"Transfer-Encoding: gzip\r\n\r\n" + GOOD,
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    POST + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n0\r\n\r\n',
    POST + b"\r\n",  # no length: an empty body
    b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",  # no Host
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nHost: b\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"POST /v1/completions\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nx: a\0b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 600_000 + b"\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\r\n\r\n\r\nhello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200 + b"\r\n\r\n",  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\0" * 70_000,
    POST.replace(b"application/json", b"text/plain") + b"Content-Length: 32\r\n\r\n" + GOOD,
    POST.replace(b"application/json", b"multipart/form-data") + b"Content-Length: 32\r\n\r\n" + GOOD,
    POST.replace(b"Content-Type: application/json\r\n", b"") + b"Content-Length: 32\r\n\r\n" + GOOD,
    b"CONNECT elsewhere.example:443 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
)


def posted(path: str, body: bytes) -> bytes:
    """A request with this body."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def malformed() -> Iterator[tuple[str, bytes]]:
    """All of them, but the one of 100 MB."""
    for number, body in enumerate(BAD_JSON):
        yield f"bad JSON {number}", posted("/v1/completions", body)
    for name in NUMBERS:
        for value in WRONG_NUMBERS:
            if (name, value) in (("seed", -1), ("seed", 1e9), ("top_k", 1e9)):
                continue  # these can be meant
            yield f"{name} {value}", posted("/v1/completions", json.dumps({"prompt": "a", name: value}).encode())
    for number, content in enumerate(BAD_VALUES):
        yield f"bad value {number}", posted("/v1/completions", json.dumps(content).encode())
    for number, content in enumerate(BAD_CHATS):
        yield f"bad chat {number}", posted("/v1/chat/completions", json.dumps(content).encode())
    for method, path in BAD_ROUTES:
        yield (
            f"{method} {path[:40]}",
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(),
        )
    for number, wire in enumerate(BAD_WIRE):
        yield f"bad wire {number}", wire
