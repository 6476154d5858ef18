"""Index arrays kept on disk: one folder per key, written aside and renamed, checked whole before use.

A folder holds one .npy file per array and `index.json` with their CRC-32 sums. Keys are made from what the arrays
depend on: the data files' sizes and times of change as well as the parameters, so a dataset made anew at the same path
is indexed anew. A folder that is cut short, altered or of another shape is built again, never believed. Arrays are
memory-mapped, so that all ranks of a machine share one copy.

Limits: old keys are not removed (delete the folder at any time); ranks starting together may each build the same
arrays, and the first to finish keeps its folder.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megabts.errors import UserError

Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]


def file_state(prefix: str) -> list[list[int]]:
    """Size in bytes and time of change in nanoseconds of a dataset's .idx and .bin file."""
    states = [os.stat(prefix + suffix) for suffix in (".idx", ".bin")]
    return [[state.st_size, state.st_mtime_ns] for state in states]


def dataset_key(prefix: str, parameters: list[int | None]) -> str:
    """Key of index arrays made from one dataset's present files with `parameters`: 32 hexadecimal digits."""
    text = json.dumps([1, os.path.abspath(prefix), file_state(prefix), parameters])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class IndexCache:
    """A folder of index arrays by key.

    Args:
        folder: made when missing.

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def get(self, key: str, shapes: Shapes, build: Callable[[], Arrays]) -> Arrays:
        """The arrays kept under `key` if they are sound and of `shapes`; else those of `build`, kept from now on."""
        arrays = self._load(self.folder / key, shapes)
        if arrays is None:
            arrays = build()
            try:
                self._save(self.folder / key, arrays)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(
                    f"data.cache {self.folder} cannot be written ({reason}); choose another folder"
                ) from None
        return arrays

    def _load(self, folder: Path, shapes: Shapes) -> Arrays | None:
        try:
            sums = json.loads((folder / "index.json").read_text())
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in shapes}
        except (OSError, ValueError, EOFError):
            return None
        for name, array in arrays.items():
            if array.shape != shapes[name] or not isinstance(sums, dict) or _checksum(array) != sums.get(name):
                return None
        return arrays

    def _save(self, folder: Path, arrays: Arrays) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
        try:
            for name, array in arrays.items():
                np.save(aside / f"{name}.npy", array, allow_pickle=False)
            (aside / "index.json").write_text(json.dumps({name: _checksum(array) for name, array in arrays.items()}))
            aside.chmod(0o755)  # mkdtemp shuts out colleagues who share the cache
            self._put(aside, folder, arrays)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _put(self, aside: Path, folder: Path, arrays: Arrays) -> None:
        """Rename `aside` to `folder`, over a damaged folder but not over a sound one that another rank put there."""
        for _ in range(2):
            try:
                aside.rename(folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self._load(folder, {name: array.shape for name, array in arrays.items()}) is not None:
                break
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _checksum(array: np.ndarray) -> int:
    head = zlib.crc32(f"{array.dtype.str} {array.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, head)
