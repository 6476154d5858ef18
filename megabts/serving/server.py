"""A process that serves: its socket, its signals, its end."""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from megabts.errors import UserError
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.progress import Progress
from megabts.serving.app import make_app
from megabts.serving.chat import ChatTemplate
from megabts.serving.http import Guard, TimedProtocol
from megabts.serving.served import Served
from megabts.serving.service import Service

TOLD_SECONDS = 1.0
"""How long a server whose model failed still answers, to say so."""


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, on which nobody listens yet. Raises UserError where it is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot serve at {host} port {port}: {reason}; choose another --host or --port") from error
    return opened


class _Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM or SIGINT, after requests in progress have had their time."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service = service
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then work."""
        await super().startup(sockets)
        self.service.start()
        self._watch = asyncio.ensure_future(self._end_on_failure())
        self.ready()

    async def _end_on_failure(self) -> None:
        await self.service.failed.wait()
        await asyncio.sleep(TOLD_SECONDS)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, wait for requests in progress, and end those that take too long."""
        self._watch.cancel()
        limit = self.service.served.limits.drain_seconds
        asyncio.get_running_loop().call_later(limit - 0.5, self.service.end)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which then ends the process with the signal."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        self.should_exit = True


def serve(
    served: Served,
    listener: socket.socket,
    *,
    api_key: str = "",
    mesh: ParallelMesh | None = None,
    progress: Progress | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal comes; `ready` is called when requests are answered. Raises UserError when the model fails.

    `mesh`: of several ranks that hold the model; this is the first, the others are in `inference.ranks.follow`.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    gc.freeze()  # what was loaded stays: neither collections between requests nor the end need look at it
    limits = served.limits
    service = Service(served, mesh=mesh, progress=progress)
    protocol = type("Protocol", (TimedProtocol,), {"read_seconds": limits.read_seconds})
    local = not api_key and ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    config = uvicorn.Config(
        Guard(make_app(service, ChatTemplate(served.tokenizer)), service, api_key, local),
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=limits.drain_seconds,  # type: ignore[arg-type]
    )
    _Server(config, service, ready).run(sockets=[listener])
    failure = service.worker.failure
    if failure is not None:
        what = str(failure).partition("\n")[0] or type(failure).__name__
        what = what if isinstance(failure, UserError) else f"{type(failure).__name__}: {what}"
        raise UserError(f"the model failed while it served, and the server ended: {what}") from failure
    service.worker.stop(1.0)
