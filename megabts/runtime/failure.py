"""One rank's failure is the end of all, told once: by the rank it happened to, which is the first to say so.

A rank that fails breaks its connections, and then every other rank fails too, in whatever collective it is in. So a
failing rank first counts itself in the ranks' store (`megabts.runtime.rendezvous`). The first in the count speaks: its
error goes on as it is. The others leave without a word, with the exit code of their own error; those stuck in a
collective are ended by their watchdogs, which see the count too.

Limits: a rank that is killed counts nothing; then the first rank to miss it says that it lost contact. Without
torchrun's store (srun), errors before the ranks have met are told by every rank.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from megabts.errors import UserError


@contextmanager
def told_once() -> Iterator[None]:
    """Inside the block, an error on several ranks is raised on the first of them; elsewhere it is `SystemExit`.

    Raises UserError in place of the communication library's error when that is the first one.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, for a rank that failed before: let us say why
        if not _speaks(error):
            raise SystemExit(error.exit_code if isinstance(error, UserError) else 1) from None
        if not _lost_contact(error):
            raise
        what = str(error).partition("] ")[2].partition(". ")[0]  # gloo says "[pair.cc:553] WHAT. ADVICE"
        reason = what or type(error).__name__
        raise UserError(
            f"lost contact with another rank: it was killed or hangs ({reason}); look at its log, and start again with "
            "--checkpoint.resume true"
        ) from error


def _speaks(error: Exception) -> bool:
    """Whether no rank counted itself before. Without a store: every rank; of a lost contact only the second."""
    from torch.distributed import DistError  # heavy, and a failing rank may not have it yet

    try:
        return _count()
    except (DistError, OSError, KeyError, ValueError):
        return not _lost_contact(error) or os.environ.get("RANK") == "1"


def _count() -> bool:
    """Count this rank; whether it is the first, in this attempt of the launcher."""
    from megabts.runtime.rendezvous import connect, launcher_keeps_store

    host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    socket.create_connection(
        (host, port), timeout=2
    ).close()  # the store's own attempt would fail with a page of frames
    store = connect(host, port, timedelta(seconds=3))
    store.set(f"noticed/{rank}", "")
    first = bool(store.add("failed", 1) == 1)
    if rank == 0 and not launcher_keeps_store():
        keys = [f"noticed/{other}" for other in range(int(os.environ["WORLD_SIZE"]))]
        end = time.monotonic() + 3
        while not store.check(keys) and time.monotonic() < end:
            time.sleep(0.05)  # the store goes with this process, and the others have still to hear of it
    return first


def _lost_contact(error: Exception) -> bool:
    """Whether an error is the communication library's: gloo has no class of its own for them."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (type(error) is RuntimeError and "gloo" in str(error))
