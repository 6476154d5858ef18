"""Logging setup for one rank: standard `logging`, one place that decides who prints.

Modules log through `logging.getLogger(__name__)` as usual. Rank 0 prints plain lines to stdout; the other ranks stay
silent but for warnings, which go to stderr with their rank in front, so that n ranks do not say everything n times.
"""

import logging
import os
import sys
from typing import TextIO

ROOT = "megabts"
"""Logger above all of ours; other libraries' loggers are left alone."""


def configure_logging(rank: int = 0, level: int | str = logging.INFO) -> None:
    """Send this process's log lines where its rank says; calling it again replaces the earlier setup.

    `level` is the lowest level rank 0 prints; other ranks print warnings at least.
    """
    handler = _RankHandler(rank)
    handler.setFormatter(_LineFormatter("" if rank == 0 else f"[rank {rank}] "))
    logger = logging.getLogger(ROOT)
    for old in [old for old in logger.handlers if isinstance(old, _RankHandler)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    if rank > 0:
        logger.setLevel(max(logger.level, logging.WARNING))
    logger.propagate = False  # libraries add handlers to the root logger; each line would come twice


def quiet_bars() -> None:
    """Draw other libraries' progress bars (tqdm's) on a terminal alone: they would fill a log.

    To be called before any such library is imported.
    """
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"


class _RankHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stdout (rank 0) or sys.stderr is at that moment, so that a progress bar can wrap it."""

    def __init__(self, rank: int) -> None:
        logging.Handler.__init__(self)
        self.rank = rank

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout if self.rank == 0 else sys.stderr


class _LineFormatter(logging.Formatter):
    """The message itself; levels other than info are named in front of it."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.prefix}{level}{super().format(record)}"
