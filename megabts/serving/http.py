"""What stands between the network and the application: time limits, size limits, keys, and errors as JSON.

`TimedProtocol` is uvicorn's HTTP/1.1 protocol with a limit on the time that a request's head may take. `Guard` is an
ASGI layer around the application: it reads every body whole, within a size and a time, before anything else happens.
"""

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megabts.serving.errors import ApiError
from megabts.serving.fields import too_large
from megabts.serving.service import Service

Headers = list[tuple[bytes, bytes]]
ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
"""What metrics tell apart."""
CLOSE = {"Connection": "close"}
LINGER_BYTES = 2**30
"""How much of a body that is too large is read and thrown away, so that its sender gets to see the answer."""
IDLE_SECONDS = 0.5
"""How long that waits for more of it, and a refused connection for its client."""


def encode(content: object) -> bytes:
    """JSON on one line, in UTF-8; lone halves of surrogate pairs stay escaped."""
    return json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()


def json_headers(body: bytes, extra: Iterable[tuple[str, str]] = ()) -> Headers:
    """Headers of a JSON answer."""
    own = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    return [(name.encode(), value.encode()) for name, value in (*own, *extra)]


class TimedProtocol(H11Protocol):
    """Requests whose head takes longer than the limit end with 408; what is no HTTP ends with 400. Both are JSON."""

    read_seconds = 10.0
    _late: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that says nothing has as long as a head may take."""
        super().connection_made(transport)
        self._late = self.loop.call_later(self.read_seconds, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side is gone."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request; the clock runs while a head is incomplete. After a refusal nothing is read."""
        if self._refused:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._late is None and self.conn.trailing_data[0]:
            self._late = self.loop.call_later(self.read_seconds, self._too_late)

    def send_400_response(self, msg: str) -> None:
        """Instead of uvicorn's plain text."""
        message = "this is no valid HTTP request; mend its head or the framing of its body"
        self._refuse(ApiError(400, message, None, "bad_http"))

    def _too_late(self) -> None:
        self._late = None
        message = f"the request's head did not come within {self.read_seconds:g} s"
        self._refuse(ApiError(408, message, None, "too_slow"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, and hang up a moment later, so that a client that still sends hears it.

        Where an answer has begun already, hang up at once.
        """
        self._stop()
        self._refused = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = encode(error.content())
            status = h11.Response(status_code=error.status, headers=json_headers(body, CLOSE.items()))
            for event in (status, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.write_eof()
            self.loop.call_later(IDLE_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Guard:
    """The application behind limits; it gets requests whole. `api_key`: what paths below /v1/ need; "": nothing.

    `local`: answer only requests for this machine by its own names, see `is_local`.
    """

    def __init__(self, app: Any, service: Service, api_key: str = "", local: bool = False) -> None:
        self.app = app
        self.service = service
        self.limits = service.served.limits
        self._key = api_key.encode()
        self._local = local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request (or the server's start and end)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self.service.metrics.requests.labels(route, str(status or "gone")).inc()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        try:
            body = await self._body(headers, receive)
            if body is None:
                return
            self._check(scope, headers, body)
        except ApiError as error:
            sends = error.status in (408, 413)  # its client may still send
            await send_error(error, send, more=sends)
            if sends:
                await self._linger(receive)
                await send({"type": "http.response.body"})
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes | None:
        """The whole body; None where the client went away. Raises ApiError."""
        most = self.limits.body_bytes
        if int(headers.get(b"content-length", b"0")) > most:
            raise too_large(most)
        reading = asyncio.ensure_future(_read(receive, most))
        ending = asyncio.ensure_future(self.service.ended.wait())
        try:
            await asyncio.wait({reading, ending}, timeout=self.limits.read_seconds, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
        finally:
            reading.cancel()
            ending.cancel()
        if self.service.ended.is_set():
            raise self.service.why()
        message = f"the request's body did not come within {self.limits.read_seconds:g} s"
        raise ApiError(408, message, None, "too_slow", CLOSE)

    def _check(self, scope: Any, headers: dict[bytes, bytes], body: bytes) -> None:
        """Raises ApiError for a wrong key, another host's name, or a body that does not say that it is JSON.

        The last two keep pages of other sites from asking through their visitors' browsers: these may send nothing but
        plain text and forms without asking first, and tell the name that the page came from.
        """
        if self._local and not is_local(headers.get(b"host", b"localhost").decode("latin-1")):
            raise ApiError(
                403,
                "without a key this server answers to localhost and to addresses alone, not to other names of this "
                "machine; use one, or start it with --api-key-file",
            )
        if self._key and scope["path"].startswith("/v1/"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                raise ApiError(
                    401, "the API key is missing or wrong; send 'Authorization: Bearer KEY'", None, "invalid_api_key"
                )
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and body and kind != b"application/json":
            raise ApiError(415, "the body does not say what it is; send 'Content-Type: application/json'")

    async def _linger(self, receive: Any) -> None:
        """Throw the rest of a body away, as long as it comes: who hangs up on a sender is not heard by it."""
        left, end = LINGER_BYTES, time.monotonic() + self.limits.read_seconds
        while left > 0 and time.monotonic() < end:
            try:
                message = await asyncio.wait_for(receive(), IDLE_SECONDS)
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return


def is_local(host: str) -> bool:
    """Whether a Host header names this machine, or an address: what no other site's page can be called."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


async def _read(receive: Any, most: int) -> bytes | None:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_large(most)
        if not message.get("more_body"):
            return b"".join(parts)


async def send_error(error: ApiError, send: Any, more: bool = False) -> None:
    """Send an error as an answer of its own; `more`: its end follows, and then the connection is closed."""
    body = encode(error.content())
    extra = {**error.headers, **(CLOSE if more else {})}
    headers = json_headers(body, extra.items())
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more})
