"""Lines of JSON to tokens: the part of preprocessing that runs in worker processes.

A line is an object with the wanted keys. The text of a key is a string, or a list of strings, each of which becomes a
sequence of its own (a document of several sequences). Lines of nothing but white space are skipped. `NaN` and
`Infinity`, which are no JSON, are let through in other keys, as Python writes them so; everything else that is not JSON
makes a line bad.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from megabts.data.readers import LineBatch
from megabts.errors import UserError
from megabts.tokenizers.words import WordEncoder

_KEPT_OF_BAD_LINES = 2000  # bytes


@dataclass(frozen=True)
class BadLine:
    """A line that is no document, why, and how it starts."""

    source: str
    line: int
    reason: str
    start: str


@dataclass
class Document:
    """A parsed line: for each key its sequences as text."""

    index: int
    """place in the batch"""
    texts: list[list[str]]
    text_bytes: list[int]
    """for each key, in UTF-8"""


@dataclass
class EncodedKey:
    """The documents of a batch for one key, as `IndexedDatasetBuilder.add_documents` takes them."""

    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray
    text_bytes: int


@dataclass
class EncodedBatch:
    """What became of a batch: documents for each key, and bad lines by line number."""

    num_documents: int
    input_bytes: int
    keys: list[EncodedKey]
    bad_lines: list[BadLine] = field(default_factory=list)


@dataclass(frozen=True)
class Encoder:
    """Turns batches of lines into tokens. Picklable, so that it can be sent to worker processes."""

    words: WordEncoder
    json_keys: tuple[str, ...]
    append_eod: bool
    max_line_bytes: int
    stop_at_bad_line: bool
    """Do not tokenize a batch that has a bad line: nobody will look at it."""

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        documents: list[Document] = []
        bad: dict[int, str] = {}
        for index, line in enumerate(batch.lines):
            try:
                if line.strip():
                    documents.append(self._parse(index, line))
            except UserError as error:
                bad[index] = str(error)
                if self.stop_at_bad_line:
                    return EncodedBatch(0, 0, [], _describe(batch, bad))
        documents, tokens = self._tokenize(documents, bad)
        keys = [self._pack(key, documents, tokens) for key in range(len(self.json_keys))]
        return EncodedBatch(len(documents), sum(map(len, batch.lines)), keys, _describe(batch, bad))

    def _parse(self, index: int, line: bytes) -> Document:
        """Raises UserError that says why the line is no document."""
        if len(line) > self.max_line_bytes:
            raise UserError(f"longer than {self.max_line_bytes} bytes (--max-line-bytes)")
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from error
        except json.JSONDecodeError as error:
            raise UserError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            raise UserError(f"not JSON that can be read: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"not a JSON object but {_kind(record)}")
        texts = [_sequences(record, key) for key in self.json_keys]
        return Document(index, texts, [_utf8_size(sequences) for sequences in texts])

    def _tokenize(self, documents: list[Document], bad: dict[int, str]) -> tuple[list[Document], list[bytes]]:
        """Tokens of all sequences of all documents, in order; documents the tokenizer refuses move to `bad`."""
        try:
            return documents, self.words.encode_batch([text for doc in documents for text in _all_texts(doc)])
        except UserError:
            pass  # one of them is refused: look which
        kept, tokens = [], []
        for document in documents:
            try:
                tokens.extend(self.words.encode_batch(_all_texts(document)))
                kept.append(document)
            except UserError as error:
                bad[document.index] = str(error)
        return kept, tokens

    def _pack(self, key: int, documents: list[Document], tokens: list[bytes]) -> EncodedKey:
        """The sequences of one key. Empty sequences are dropped; a document of none stays, empty and without eod."""
        dtype, eod_id = self.words.dtype, self.words.tokenizer.eod_id
        end = np.array([eod_id], dtype).tobytes() if self.append_eod and eod_id is not None else b""
        sequences: list[bytes] = []
        counts: list[int] = []
        position = 0
        for document in documents:
            before = sum(map(len, document.texts[:key]))
            start = position + before
            found = [sequence for sequence in tokens[start : start + len(document.texts[key])] if sequence]
            if found:
                found[-1] += end
            sequences.extend(found)
            counts.append(len(found))
            position += sum(map(len, document.texts))
        lengths = np.array([len(sequence) // dtype.itemsize for sequence in sequences], np.int32)
        text_bytes = sum(document.text_bytes[key] for document in documents)
        return EncodedKey(np.frombuffer(b"".join(sequences), dtype), lengths, np.array(counts, np.int64), text_bytes)


def _all_texts(document: Document) -> list[str]:
    return list(chain.from_iterable(document.texts))


def _describe(batch: LineBatch, bad: dict[int, str]) -> list[BadLine]:
    def start(index: int) -> str:
        return batch.lines[index][:_KEPT_OF_BAD_LINES].decode("utf-8", errors="replace")

    return [BadLine(batch.source, batch.first_line + i, bad[i], start(i)) for i in sorted(bad)]


def _sequences(record: dict[str, Any], key: str) -> list[str]:
    """The text of a key as a list. Raises UserError when it is missing or no text."""
    if key not in record:
        raise UserError(f'no key "{key}", only {_some_of(list(record))}')
    value = record[key]
    sequences = value if isinstance(value, list) else [value]
    for text in sequences:
        if not isinstance(text, str):
            raise UserError(f'the value of "{key}" is not text but {_kind(text)}')
    return sequences


def _some_of(keys: Sequence[str]) -> str:
    shown = ", ".join(f'"{key[:40]}"' for key in keys[:5]) or "none"
    return shown if len(keys) <= 5 else f"{shown}, ..."


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds[type(value)]


def _utf8_size(texts: list[str]) -> int:
    """Raises UserError for half of a surrogate pair (an escape such as \\ud800), which is no text."""
    try:
        return sum(len(text.encode("utf-8")) for text in texts)
    except UnicodeEncodeError as error:
        raise UserError("the text has half of a surrogate pair (an escape such as \\ud800)") from error
