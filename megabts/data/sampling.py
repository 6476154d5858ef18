"""A sample of texts from JSON lines or plain text, spread evenly over every file: what a tokenizer is trained on."""

import json
from collections.abc import Iterator, Sequence

from megabts.data.readers import STDIN, find_inputs, open_input, read_lines
from megabts.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".txt", ".txt.gz")
_PLAIN_TEXT = (".txt", ".txt.gz")
_PLAIN_TEXT_PIECE = 1 << 13  # bytes
_MAX_LINE_BYTES = 256 << 20


def sample_texts(inputs: Sequence[str], bytes_per_file: int | None = None, json_key: str = "text") -> Iterator[str]:
    """Texts of all files in order; of each at most `bytes_per_file` UTF-8 bytes, taken evenly from all of it.

    Every file is read twice when there is a budget (first for its size), so standard input is refused.
    Raises UserError, with the line, for a line that is no object with text.
    """
    files = find_inputs(inputs, SUFFIXES)
    if STDIN in files:
        raise UserError("standard input cannot be sampled, as files are read twice; give a file")
    for file in files:
        yield from _texts(file, json_key) if bytes_per_file is None else _sample(file, bytes_per_file, json_key)


def _sample(file: str, budget: int, json_key: str) -> Iterator[str]:
    """A text is taken whenever the bytes taken lag behind their share of the bytes passed."""
    total = sum(len(text.encode("utf-8")) for text in _texts(file, json_key))
    passed = taken = 0
    for text in _texts(file, json_key):
        size = len(text.encode("utf-8"))
        if taken * total <= passed * budget and taken < budget:
            part = text if size <= budget - taken else text.encode("utf-8")[: budget - taken].decode("utf-8", "ignore")
            taken += min(size, budget - taken)
            yield part
        passed += size


def _texts(file: str, json_key: str) -> Iterator[str]:
    try:
        yield from _pieces(file) if file.endswith(_PLAIN_TEXT) else _values(file, json_key)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} (byte 0x{error.object[error.start]:02x})") from error


def _pieces(file: str) -> Iterator[str]:
    """Plain text in pieces of whole lines."""
    with open_input(file) as content:
        while lines := content.readlines(_PLAIN_TEXT_PIECE):
            yield b"".join(lines).decode("utf-8")


def _values(file: str, json_key: str) -> Iterator[str]:
    for number, line in enumerate(read_lines(file, _MAX_LINE_BYTES), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8"))[json_key]
            if not isinstance(text, str):
                raise TypeError
            text.encode("utf-8")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{file}:{number}: not a JSON object with text in "{json_key}"; repair it') from error
        yield text
