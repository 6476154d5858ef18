"""Who prints what: rank 0 to stdout, the others warnings to stderr with their rank."""

import logging
from collections.abc import Iterator

import pytest

from megabts.runtime.log import configure_logging


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    logger = logging.getLogger("megabts")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_rank_0_prints_info_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0)
    configure_logging(0)
    logging.getLogger("megabts.train").info("step %d", 3)
    logging.getLogger("megabts.train").warning("slow")
    logging.getLogger("megabts.train").debug("hidden")
    assert capsys.readouterr() == ("step 3\nwarning: slow\n", "")


def test_other_ranks_say_warnings_with_their_rank(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(2, "DEBUG")
    logging.getLogger("megabts.train").info("step 3")
    logging.getLogger("megabts.train").error("broken")
    assert capsys.readouterr() == ("", "[rank 2] error: broken\n")


def test_level_is_kept_above_warning(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0, logging.DEBUG)
    logging.getLogger("megabts.x").debug("seen")
    configure_logging(1, logging.ERROR)
    logging.getLogger("megabts.x").warning("unseen")
    assert capsys.readouterr() == ("debug: seen\n", "")


def test_other_libraries_are_left_alone() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    configure_logging(0)
    assert (list(root.handlers), root.level) == before
