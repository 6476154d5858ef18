"""What every test shares: hypothesis without deadlines, which would measure the machine's load and not the code."""

import signal

from hypothesis import settings

settings.register_profile("megabts", deadline=None, print_blob=True)
settings.load_profile("megabts")


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start: a shell's background job ignores it, and so would they."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
