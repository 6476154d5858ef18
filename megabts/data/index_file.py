"""The index file `PREFIX.idx` of an indexed dataset: layout, reading with all checks, writing.

Little-endian, without padding:

    offset    size  field
    0         9     b"MMIDIDX\\0\\0"
    9         8     u64 version = 1
    17        1     u8  type code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
    18        8     u64 S = number of sequences
    26        8     u64 D = number of documents + 1
    34        4 S   i32 length of each sequence, in tokens
    34 + 4S   8 S   i64 byte offset of each sequence in .bin
    34 + 12S  8 D   i64 first sequence of each document; the first is 0, the last is S

A document is usually one sequence; an empty document has none. The file carries no checksum, so everything that can be
wrong with its structure is checked when it is read, in time proportional to its size and a constant amount of memory.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from megabts.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
BLOCK = 1 << 20
"""Elements handled at a time where an array may be larger than memory."""


def optimal_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 if `vocab_size` (unpadded) is below 65500, else int32: Megatron-LM's rule."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def dtype_code(dtype: Any) -> int:
    """The file's code of a token type. Raises UserError for a type that tokens cannot have."""
    wanted = np.dtype(dtype).newbyteorder("<")
    for code, known in DTYPES.items():
        if known == wanted and wanted.kind in "iu":
            return code
    raise UserError(f"tokens cannot be stored as {np.dtype(dtype)}; use uint16 or int32")


@dataclass(frozen=True)
class Index:
    """A checked index: read-only views of the file, and the size that .bin must have."""

    dtype: np.dtype[Any]
    lengths: np.ndarray
    """int32 [S], tokens"""
    pointers: np.ndarray
    """int64 [S], bytes"""
    document_indices: np.ndarray
    """int64 [D], sequence numbers"""
    bin_size: int
    """bytes"""


def damaged(path: str, what: str) -> UserError:
    """The error that says `what` is wrong with the file."""
    return UserError(f"{path}: {what}; the file is damaged or was cut, so copy it again or rebuild it")


def read_index(path: str) -> Index:
    """Read and check a .idx file. Raises UserError that names the file and what is wrong with it."""
    dtype, lengths, pointers, marks = _read_arrays(path)
    size = _check_sequences(path, lengths, pointers, dtype.itemsize)
    _check_documents(path, marks, len(lengths))
    return Index(dtype, lengths, pointers, marks, size)


def _read_arrays(path: str) -> tuple[np.dtype[Any], np.ndarray, np.ndarray, np.ndarray]:
    """Type, lengths, pointers and document indices. Checks the header and the size of the file."""
    try:
        size = os.path.getsize(path)
        if size < HEADER.size:
            raise damaged(path, f"only {size} bytes, shorter than the {HEADER.size} of the header")
        content = np.memmap(path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    magic, version, code, sequences, documents = HEADER.unpack(content[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise damaged(path, "it does not start with MMIDIDX, so it is no index of an indexed dataset")
    if version != VERSION:
        raise damaged(path, f"version {version}, where only version {VERSION} is known")
    if code not in DTYPES or DTYPES[code].kind == "f":
        raise damaged(path, f"token type code {code}, which is no integer type (1, 2, 3, 4, 5 or 8)")
    if documents < 1:
        raise damaged(path, "document count 0, where at least 1 is needed")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size == expected + sequences and sequences > 0:
        raise UserError(f"{path}: a multimodal index (it has sequence modes), which is not supported; use text data")
    if size != expected:
        raise damaged(path, f"{size} bytes, where {sequences} sequences and {documents} document marks take {expected}")
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    marks = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * sequences)
    return DTYPES[code], lengths, pointers, marks


def _check_sequences(path: str, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Sequences must follow each other without gaps. Returns the bytes they take in .bin."""
    position = 0
    for start in range(0, len(lengths), BLOCK):
        block = lengths[start : start + BLOCK].astype(np.int64)
        negative = np.flatnonzero(block < 0)
        if negative.size:
            raise damaged(path, f"sequence {start + negative[0]} has length {block[negative[0]]}")
        ends = position + np.cumsum(block) * itemsize
        found = pointers[start : start + BLOCK]
        wrong = np.flatnonzero(ends - block * itemsize != found)
        if wrong.size:
            first = int(wrong[0])
            place = int(ends[first] - block[first] * itemsize)
            raise damaged(path, f"sequence {start + first} at byte {found[first]}, where the lengths put it at {place}")
        position = int(ends[-1])
    return position


def _check_documents(path: str, marks: np.ndarray, sequences: int) -> None:
    if marks[0] != 0:
        raise damaged(path, f"the first document starts at sequence {marks[0]}, not 0")
    if marks[-1] != sequences:
        raise damaged(path, f"the documents end at sequence {marks[-1]} of {sequences}")
    decreasing = np.flatnonzero(marks[1:] < marks[:-1])
    if decreasing.size:
        raise damaged(path, f"document {decreasing[0]} ends before it starts")


def write_index(file: IO[bytes], dtype: Any, lengths: np.ndarray, document_indices: np.ndarray) -> None:
    """Write the index of sequences of `lengths` [S] and documents `document_indices` [D]."""
    file.write(HEADER.pack(MAGIC, VERSION, dtype_code(dtype), len(lengths), len(document_indices)))
    _write_blocks(file, lengths, lambda block: block.astype("<i4"))
    position = 0

    def pointers(block: np.ndarray) -> np.ndarray:
        nonlocal position
        sizes = block.astype(np.int64) * np.dtype(dtype).itemsize
        ends = position + np.cumsum(sizes)
        position = int(ends[-1])
        return (ends - sizes).astype("<i8")

    _write_blocks(file, lengths, pointers)
    _write_blocks(file, document_indices, lambda block: block.astype("<i8"))


def _write_blocks(file: IO[bytes], values: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> None:
    for start in range(0, len(values), BLOCK):
        file.write(convert(values[start : start + BLOCK]).tobytes())
