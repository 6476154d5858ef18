"""What every test shares: hypothesis without deadlines, which would measure the machine's load and not the code."""

import signal

from hypothesis import settings

settings.register_profile("megabts", deadline=None, print_blob=True)
settings.load_profile("megabts")


def pytest_configure() -> None:
    """Let Ctrl-C and a hang-up reach the processes that tests start: a background job and `nohup` ignore them, and so
    would they. A handler here is the default there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
