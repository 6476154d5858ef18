"""One rank's failure is the end of all, told once: by the rank it happened to, which is the first to say so.

A rank that fails breaks its connections, and then every other rank fails too, in whatever collective it is in. So a
failing rank first counts itself at the launcher's key-value store (torchrun keeps one for the whole run). The first in
the count speaks: its error goes on as it is. The others leave with exit code 1 and without a word.

Limits: a rank that is killed counts nothing; then the first rank to miss it says that it lost contact. Without
torchrun's store (srun) every rank speaks.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from megabts.errors import UserError


@contextmanager
def told_once() -> Iterator[None]:
    """Inside the block, an error on several ranks is raised on the first of them; elsewhere it is `SystemExit(1)`.

    Raises UserError in place of the communication library's error when that is the first one.
    """
    try:
        yield
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, for a rank that failed before: let us say why
        if not _first_to_fail():
            raise SystemExit(1) from None
        if not _lost_contact(error):
            raise
        what = str(error).partition("] ")[2].partition(". ")[0]  # gloo says "[pair.cc:553] WHAT. ADVICE"
        reason = what or type(error).__name__
        raise UserError(
            f"lost contact with another rank: it was killed or hangs ({reason}); look at its log, and start again with "
            "--checkpoint.resume true"
        ) from error


def _first_to_fail() -> bool:
    """Whether no rank counted itself before, in this attempt of the launcher; True when there is nowhere to count."""
    from torch.distributed import DistError, TCPStore  # heavy, and a failing rank may not have it yet

    get = os.environ.get
    if get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=3)
        store = TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        return bool(store.add(f"megabts/failed/{get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1)
    except DistError:
        return True


def _lost_contact(error: Exception) -> bool:
    """Whether an error is the communication library's: gloo has no class of its own for them."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (type(error) is RuntimeError and "gloo" in str(error))
