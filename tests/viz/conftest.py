"""Fixtures of the report's tests."""

import pytest

from megabts.viz.report import Report
from tests.viz.fakes import realistic_report


@pytest.fixture
def report() -> Report:
    """A fresh realistic report that a test may change."""
    return realistic_report()
