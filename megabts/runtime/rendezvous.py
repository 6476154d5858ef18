"""How ranks meet: at one key-value store, within a set time, and with one line that says who did not come.

The store is torchrun's, where torchrun started the ranks; otherwise (srun) the first rank keeps it at
MASTER_ADDR:MASTER_PORT. Process groups are set up through it, and ranks tell each other of failures in it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from megabts.errors import UserError
from megabts.runtime.device import Launch

ANSWER = timedelta(seconds=5)
"""How long the store may take for one answer."""


@dataclass(frozen=True)
class Identity:
    """The process that is a rank."""

    rank: int
    world_size: int
    host: str
    pid: int
    pid_space: str
    """Equal for processes that can signal each other: host and process-id namespace."""
    started: str
    """Start time of the process, in the clock ticks of /proc; with `pid` it is one process for good."""

    @classmethod
    def of_this_process(cls, launch: Launch) -> "Identity":
        """This process as a rank."""
        host, pid = socket.gethostname(), os.getpid()
        try:
            pid_space = f"{host} {os.stat('/proc/self/ns/pid').st_ino}"
        except OSError:
            pid_space = host
        return cls(launch.rank, launch.world_size, host, pid, pid_space, process_stat(pid)[1])

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


def process_stat(pid: int) -> tuple[str, str]:
    """State letter and start time of a process, from /proc; ("", "") when it is gone or there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclass(frozen=True)
class Meeting:
    """All ranks came. `store` sets up process groups; `connect` opens another connection to the same keys."""

    me: Identity
    ranks: tuple[Identity, ...]
    store: Store
    address: tuple[str, int]
    hosted: bool
    """Whether the first rank keeps the store itself."""

    def connect(self) -> Store:
        """A connection of its own: one waits for its answers without holding up others. Raises DistError."""
        return connect(*self.address)


def attempt() -> str:
    """The launcher's number of this start; keys carry it, because torchrun's store outlives its restarts."""
    return f"megabts/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def launcher_keeps_store() -> bool:
    """Whether torchrun keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(host: str, port: int, timeout: timedelta = ANSWER) -> Store:
    """Connect to the store that is kept at this address. Raises DistError, also where something else listens there."""
    opened: list[Store] = []
    errors: list[DistError] = []

    def attempt_it() -> None:
        try:
            opened.append(TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))
        except DistError as error:
            errors.append(error)

    # Its own time-out does not hold where a listener is mute: a stopped process, or another program.
    opener = threading.Thread(target=attempt_it, daemon=True)
    opener.start()
    opener.join(timeout.total_seconds() + 1)
    if not opened:
        raise errors[0] if errors else DistError(f"no answer from {host}:{port}")
    return PrefixStore(attempt(), opened[0])


def meet(launch: Launch, timeout: float) -> Meeting | None:
    """Wait at most `timeout` seconds for all ranks; None for a single one.

    Raises UserError: no address, port in use, nobody there, ranks missing, or too many of them. Raises SystemExit when
    another rank failed meanwhile, which says why.
    """
    if launch.world_size == 1:
        return None
    deadline = time.monotonic() + timeout
    host, port = _address()
    hosted = not launcher_keeps_store()
    server = _serve(host, port) if hosted and launch.rank == 0 else None
    _wait_for_port(host, port, deadline, f"no answer from rank 0 at {host}:{port} within {timeout:g} s")
    try:
        store = PrefixStore(attempt(), server) if server else connect(host, port)
    except DistError as error:
        raise UserError(
            f"{host}:{port} is not the store of rank 0; another program has that port: set another MASTER_PORT"
        ) from error
    me = Identity.of_this_process(launch)
    ranks = _gather(store, me, deadline, timeout)
    return Meeting(me, ranks, store, (host, port), hosted)


def _address() -> tuple[str, int]:
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"MASTER_ADDR is {host!r} and MASTER_PORT {port!r}, but several ranks (WORLD_SIZE) need the first rank's "
            "host and a free port of it; set them, or start with torchrun"
        )
    return host, int(port)


def _serve(host: str, port: int) -> TCPStore:
    try:
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))  # the store's own complaint comes with a page of frames
        return TCPStore(host, port, is_master=True, timeout=ANSWER, wait_for_workers=False)
    except (OSError, DistError) as error:
        raise UserError(
            f"port {port} (MASTER_PORT) is in use on {socket.gethostname()}; set MASTER_PORT to a free one"
        ) from error


def _wait_for_port(host: str, port: int, deadline: float, problem: str) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or str(error)
                raise UserError(
                    f"{problem} ({reason}); see whether rank 0 runs, and whether MASTER_ADDR and MASTER_PORT are its"
                ) from error
        time.sleep(0.2)


def _gather(store: Store, me: Identity, deadline: float, timeout: float) -> tuple[Identity, ...]:
    mine = json.dumps(asdict(me))
    first = store.compare_set(f"met/{me.rank}", "", mine).decode()
    if first != mine:
        raise UserError(f"rank {me.rank} came twice: {_read(first)} and {me}; give every process a RANK of its own")
    keys = [f"met/{rank}" for rank in range(me.world_size)]
    if not _wait(lambda: store.check(keys), store, deadline):
        missing = [key.partition("/")[2] for key in keys if not store.check([key])]
        names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{me.world_size - len(missing)} of {me.world_size} ranks came within {timeout:g} s; missing: {names}; "
            "see whether they were started, and whether WORLD_SIZE is right"
        )
    ranks = tuple(_read(value.decode()) for value in store.multi_get(keys))
    for other in ranks:
        if other.world_size != me.world_size:
            raise UserError(
                f"WORLD_SIZE is {me.world_size} for {me} and {other.world_size} for {other}; give all ranks the same"
            )
    return ranks


def _wait(done: Callable[[], bool], store: Store, deadline: float) -> bool:
    while not done():
        if store.check(["failed"]):
            raise SystemExit(1)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _read(text: str) -> Identity:
    return Identity(**json.loads(text))
