"""Reading JSON lines: which files an input means, and their lines in batches.

Inputs are files, folders (searched for *.jsonl, *.jsonl.gz and *.json), glob patterns, and `-` for standard input;
files ending in .gz are decompressed. Lines are handed on as bytes: decoding and parsing is work for many processes. A
line ends at "\\n" only; a byte order mark at the start of a file and a "\\r" before the line end are dropped.
"""

import codecs
import glob
import gzip
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megabts.errors import UserError

STDIN = "-"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
_NOT_READ = (".zst", ".bz2", ".xz", ".zip", ".parquet", ".arrow")
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class LineBatch:
    """Consecutive lines of one source, the first of which is line `first_line` (counted from 1)."""

    source: str
    first_line: int
    lines: list[bytes]


def find_inputs(inputs: Sequence[str], suffixes: tuple[str, ...] = _SUFFIXES) -> list[str]:
    """The files that `inputs` mean, in the given order; folders and patterns in the order of their names.

    Raises UserError for an input that means no file, or a compression that is not read.
    """
    files = [file for name in inputs for file in _expand(name, suffixes)]
    for file in files:
        if file.endswith(_NOT_READ):
            raise UserError(f"{file}: {Path(file).suffix} files are not read; give JSON lines, plain or .gz")
    return files


def _expand(name: str, suffixes: tuple[str, ...]) -> list[str]:
    if name == STDIN or os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        found = sorted(str(path) for path in Path(name).rglob("*") if _is_text_file(path, suffixes))
        if not found:
            raise UserError(f"folder {name} has no files ending in {', '.join(suffixes)}")
        return found
    if _GLOB_CHARACTERS & set(name):
        matching = (Path(path) for path in glob.glob(name, recursive=True))
        found = sorted(str(path) for path in matching if path.is_file() and not _is_product(path))
        if not found:
            raise UserError(f"pattern {name} matches no file")
        return found
    if os.path.exists(name):  # a pipe or device, such as /dev/fd/63
        return [name]
    raise UserError(f"input {name} does not exist")


def _is_text_file(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.endswith(suffixes) and path.is_file() and not _is_product(path)


def _is_product(path: Path) -> bool:
    """Whether preprocessing wrote the file: its output may lie in the folder of its input."""
    return path.name.endswith("_rejects.jsonl") or (path.suffix == ".json" and path.with_suffix(".idx").exists())


@contextmanager
def open_input(name: str) -> Iterator[IO[bytes]]:
    """Open a file (or standard input) for reading bytes; what goes wrong while reading is a UserError too."""
    try:
        if name == STDIN:
            yield sys.stdin.buffer
        elif name.endswith(".gz"):
            with gzip.open(name, "rb") as file:
                yield file  # type: ignore[misc]  # GzipFile reads bytes like any file
        else:
            with open(name, "rb", buffering=1 << 20) as file:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is no complete gzip file ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error


def read_lines(name: str, max_bytes: int) -> Iterator[bytes]:
    """The lines of an input without their ends; a line longer than `max_bytes` is cut to `max_bytes` + 1 bytes."""
    with open_input(name) as file:
        mark = codecs.BOM_UTF8
        while line := file.readline(max_bytes + 2):
            if len(line) == max_bytes + 2 and not line.endswith(b"\n"):
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass  # the rest of a line that is too long anyway
                yield line[: max_bytes + 1]
            else:
                yield line.removeprefix(mark).rstrip(b"\r\n")
            mark = b""


def line_batches(files: Sequence[str], max_line_bytes: int, max_lines: int, max_bytes: int) -> Iterator[LineBatch]:
    """All lines of all files, in order, in batches of at most `max_lines` and (long lines aside) `max_bytes`."""
    for name in files:
        source = "<stdin>" if name == STDIN else name
        lines: list[bytes] = []
        first, size = 1, 0
        for line in read_lines(name, max_line_bytes):
            if lines and (len(lines) == max_lines or size + len(line) > max_bytes):
                yield LineBatch(source, first, lines)
                first, size, lines = first + len(lines), 0, []
            lines.append(line)
            size += len(line)
        if lines:
            yield LineBatch(source, first, lines)
