"""Errors meant for people: one line that says what is wrong, where, and what to do about it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message is one line: what, where, what to do. Tools print it without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """A command line or configuration that cannot be meant."""

    exit_code = 2


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit with its code; a `UserError` becomes one line on stderr.

    `--debug` anywhere on the command line keeps the traceback.
    """
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        sys.exit(main() or 0)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)
