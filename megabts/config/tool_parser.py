"""The argument parser of the tools: argparse that answers a mistake with one line and takes no abbreviations."""

import argparse
import difflib
from typing import Any, NoReturn

from megabts.errors import UsageError


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
