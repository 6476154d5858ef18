"""The argument parser of the tools: argparse that answers a mistake with one line and takes no abbreviations."""

import argparse
import difflib
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from megabts.errors import UsageError

PICTURES = (".png", ".svg", ".pdf")


class ToolParser(argparse.ArgumentParser):
    """Raises UsageError, with the nearest flag for a misspelt one, where argparse prints its usage and leaves."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every mistake."""
        what, _, unknown = message.partition("unrecognized arguments: ")
        flags = [word for word in unknown.split() if word.startswith("--")]
        if not what and flags:
            flag = flags[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            raise UsageError(f"unknown flag {flag}; " + (f"did you mean {near[0]}?" if near else "see --help"))
        raise UsageError(f"{message}; see --help")


def check_output(flag: str, path: Path) -> None:
    """Look, before the work, whether a file can be written. Raises UsageError."""
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}; make it, or name another file")
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; name a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {error.strerror}; name another file") from error


def check_picture(flag: str, path: Path) -> None:
    """Whether a name is one of a picture. Raises UsageError."""
    if path.suffix not in PICTURES:
        raise UsageError(f"{flag} {path} is no picture's name; end it with .png, .svg or .pdf")
