"""torchrun for the launch scripts: its options, without its pages on ranks that have said themselves why they failed.

The exit code is the ranks' (the largest, where they differ; 1 where all were killed), and of a launcher that was sent a
signal the code that its ranks ended with: they write it into the file LAUNCH_EXIT_CODE, as torchrun does not see it.
"""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

REPORTERS = ("multiprocessing.api", "agent.server.api")
"""Modules below torch.distributed.elastic that log every process they end."""


def launch(exit_code: Path) -> int:
    """Run torchrun with this process's arguments; `exit_code`: the ranks' file. Returns the code to exit with."""
    os.environ["LAUNCH_EXIT_CODE"] = str(exit_code)
    for name in REPORTERS:
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # which torchrun sends the others
                print(f"rank {rank} (pid {failure.pid}) was ended by {_name(-failure.exitcode)}", file=sys.stderr)
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException as error:
        return int(exit_code.read_text()) if exit_code.exists() else 128 + error.sigval
    return 0


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        code = launch(Path(folder) / "exit_code")
    sys.exit(code)
