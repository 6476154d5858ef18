"""Indexed datasets: Megatron-LM's .bin and .idx files, written safely, read through a memory map and checked at open.

A dataset `PREFIX` is a pair of files. `PREFIX.bin` holds raw tokens, one sequence after the other, nothing else;
`PREFIX.idx` says where sequences and documents begin (`index_file.py` has the layout). `PREFIX.json` may say how the
tokens were made (`sidecar.py`).

Reading: all that can be wrong with the structure is found at open; of `.bin` only the size is asked for. A changed
token is not seen; `max_token()` (a full scan) finds those that lie outside the vocabulary.

Writing: tokens go straight to disk, only lengths stay in memory (4 bytes a sequence, 8 a document). All is written
under temporary names (`PREFIX.bin.tmpPID`) and renamed at the end, .idx last: a `PREFIX.idx` belongs to a complete
dataset.
"""

import array
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from megabts.data.index_file import BLOCK, damaged, dtype_code, read_index, write_index
from megabts.data.sidecar import read_sidecar
from megabts.errors import UserError


def dataset_prefix(path: str | Path) -> str:
    """The prefix that `path` means: people also name the .idx or .bin file itself."""
    name = str(path)
    return name[:-4] if name.endswith((".idx", ".bin")) else name


class IndexedDataset:
    """A dataset opened for reading. Picklable: the copy opens the files again.

    `lengths` int32 [S] tokens; `pointers` int64 [S] bytes; `document_indices` int64 [D] sequence numbers; `dtype` of
    the tokens; `num_tokens`; `sidecar`, the content of PREFIX.json or {}. The arrays are read-only views of the files.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open and check `prefix`.bin and .idx. Raises UserError that names the file and what is wrong with it."""
        self.prefix = dataset_prefix(prefix)
        index_path, tokens_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        for path in (index_path, tokens_path):
            if not os.path.isfile(path):
                raise UserError(f"dataset {self.prefix}: there is no file {path}")
        index = read_index(index_path)
        self.dtype = index.dtype
        self.lengths = index.lengths
        self.pointers = index.pointers
        self.document_indices = index.document_indices
        self._tokens = _map_tokens(tokens_path, index.dtype, index.bin_size)
        self.num_tokens: int = len(self._tokens)
        self.sidecar: dict[str, Any] = read_sidecar(self.prefix, len(self.lengths), self.num_tokens)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of sequence `index` (to its end by default), a read-only view [length].

        Raises IndexError for a sequence, ValueError for a part, that is not there.
        """
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"dataset {self.prefix} has {len(self.lengths)} sequences, no sequence {index}")
        size = int(self.lengths[index])
        wanted = size - offset if length is None else length
        if offset < 0 or wanted < 0 or offset + wanted > size:
            raise ValueError(f"sequence {index} of {self.prefix} has {size} tokens: no part {offset}+{wanted}")
        start = int(self.pointers[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + wanted]

    def token_range(self) -> tuple[int, int]:
        """Smallest and largest token, by a scan of the whole file; (0, -1) when there is none."""
        if self.num_tokens == 0:
            return 0, -1
        blocks = (self._tokens[start : start + 4 * BLOCK] for start in range(0, self.num_tokens, 4 * BLOCK))
        ends = [(int(block.min()), int(block.max())) for block in blocks]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def max_token(self) -> int:
        """Largest token, by a scan of the whole file; -1 when there is none."""
        return self.token_range()[1]


def _map_tokens(path: str, dtype: np.dtype[Any], size: int) -> np.ndarray:
    """The tokens of .bin [num_tokens]. Raises UserError unless the file has exactly `size` bytes."""
    found = os.path.getsize(path)
    if found != size:
        difference = f"{size - found} missing" if found < size else f"{found - size} too many"
        raise damaged(path, f"{found} bytes, where the index says {size} ({difference})")
    if size == 0:
        return np.empty(0, dtype)
    try:
        return np.memmap(path, mode="r", dtype=dtype).view(np.ndarray)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


class IndexedDatasetBuilder:
    """Writes `prefix`.bin and .idx. A context manager: left without `finalize`, it leaves nothing behind."""

    def __init__(self, prefix: str | Path, dtype: Any) -> None:
        """Starts the files; folders are made as needed. Raises UserError when that is not possible."""
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        dtype_code(dtype)  # refuses types that tokens cannot have
        self._lengths = array.array("i")
        self._documents = array.array("q", [0])
        self._temporary = {suffix: f"{self.prefix}.{suffix}.tmp{os.getpid()}" for suffix in ("bin", "json", "idx")}
        with _writing(self.prefix):
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin: IO[bytes] = open(self._temporary["bin"], "wb", buffering=1 << 20)  # noqa: SIM115, abort() closes

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def add_item(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Add one sequence [n] to the document under way. Raises ValueError for a token the type cannot hold."""
        self._add_sequences(tokens, np.array([len(tokens)]))

    def end_document(self) -> None:
        """The sequences added since the last call are a document (none: an empty one)."""
        self._documents.append(len(self._lengths))

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Add a document of sequences of `lengths`, whose `tokens` stand one after the other."""
        self.add_documents(tokens, lengths, [len(lengths)])

    def add_documents(
        self,
        tokens: Sequence[int] | np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        sequences: Sequence[int] | np.ndarray,
    ) -> None:
        """Add many documents at once: document d is the next `sequences[d]` entries of `lengths`."""
        counts = np.asarray(sequences, np.int64)
        if counts.sum() != len(lengths) or (counts < 0).any():
            raise ValueError(f"{len(lengths)} sequences do not make documents of {counts.sum()}")
        first = len(self._lengths)
        self._add_sequences(tokens, np.asarray(lengths, np.int64))
        self._documents.frombytes((first + np.cumsum(counts)).tobytes())

    def _add_sequences(self, tokens: Sequence[int] | np.ndarray, lengths: np.ndarray) -> None:
        values = np.asarray(tokens)
        if values.ndim != 1 or lengths.sum() != len(values) or (lengths < 0).any():
            raise ValueError(f"sequences of {lengths.sum()} tokens do not match tokens of shape {list(values.shape)}")
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise UserError(f"{self.prefix}: a sequence of {lengths.max()} tokens is too long: at most 2147483647")
        if values.dtype != self.dtype and len(values):
            limits = np.iinfo(self.dtype)
            if values.dtype.kind not in "iu" or values.min() < limits.min or values.max() > limits.max:
                raise ValueError(f"tokens {values.min()}..{values.max()} do not fit {self.dtype} ({self.prefix})")
        with _writing(self.prefix):
            self._bin.write(values.astype(self.dtype, copy=False).tobytes())
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def add_index(self, prefix: str | Path) -> None:
        """Add all of another dataset. Raises UserError when it is damaged or its token type is another."""
        part = IndexedDataset(prefix)
        if part.dtype != self.dtype:
            raise UserError(
                f"{part.prefix} stores {part.dtype}, {self.prefix} {self.dtype}; tokenize one of them again"
            )
        first = len(self._lengths)
        with _writing(self.prefix), open(f"{part.prefix}.bin", "rb") as tokens:
            shutil.copyfileobj(tokens, self._bin, 1 << 22)
        for start in range(0, len(part), BLOCK):
            self._lengths.frombytes(part.lengths[start : start + BLOCK].tobytes())
        self._documents.frombytes((first + part.document_indices[1:]).tobytes())

    def finalize(self, sidecar: dict[str, Any] | None = None) -> None:
        """Write the index and `sidecar`, and put everything in place. Raises UserError when the disk is full."""
        if self._documents[-1] != len(self._lengths):
            raise ValueError(f"{self.prefix}: end_document() is missing after the last sequences")
        with _writing(self.prefix):
            _finish(self._bin)
            with open(self._temporary["idx"], "wb", buffering=1 << 20) as index:
                lengths = np.frombuffer(self._lengths, np.int32)
                write_index(index, self.dtype, lengths, np.frombuffer(self._documents, np.int64))
                _finish(index)
            if sidecar:
                with open(self._temporary["json"], "wb") as file:
                    file.write((json.dumps(sidecar, indent=2) + "\n").encode("utf-8"))
                    _finish(file)
            self._put_in_place(bool(sidecar))

    def _put_in_place(self, with_sidecar: bool) -> None:
        """Old files go first, so that no moment shows a new .bin with an old index."""
        for suffix in ("idx", "json"):
            Path(f"{self.prefix}.{suffix}").unlink(missing_ok=True)
        for suffix in ("bin", "json", "idx") if with_sidecar else ("bin", "idx"):
            os.replace(self._temporary[suffix], f"{self.prefix}.{suffix}")

    def abort(self) -> None:
        """Remove what was written under temporary names. Harmless after `finalize`."""
        with suppress(OSError):  # a full disk shows again when the buffer is flushed; the file goes anyway
            self._bin.close()
        for path in self._temporary.values():
            Path(path).unlink(missing_ok=True)


@contextmanager
def _writing(prefix: str) -> Iterator[None]:
    """Turns the operating system's errors into one line about `prefix`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {prefix}: {error.strerror or error}; nothing was put in place") from error


def _finish(file: IO[bytes]) -> None:
    """To the disk, so that a rename never outlives its content."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
