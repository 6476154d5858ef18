"""Files that are on the disk when the call returns, hashed while they are written.

Hashing overlaps with writing (both leave Python's lock), so a checksum costs no second reading of the file. A rename is
durable only after an fsync of the folder that holds the name; whoever renames calls `sync_folder` afterwards.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like."""

    sha256: str
    """Of all bytes of the file, in hexadecimal."""
    bytes: int
    """Size of the file."""


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write `chunks` one after another to `path`, wait until they are on the disk, return their hash and size."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        for chunk in chunks:
            hashed = hasher.submit(digest.update, chunk)
            file.write(chunk)
            hashed.result()
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(digest.hexdigest(), size)


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces of at most `CHUNK_BYTES`."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def hash_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """sha256 of all chunks, one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` (new, renamed, removed) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Give `path` new contents; at every moment it holds either the old text or the new one, whole."""
    aside = beside(path, "tmp")
    write_file(aside, [text.encode()])
    os.replace(aside, path)
    sync_folder(path.parent)


def beside(path: Path, suffix: str) -> Path:
    """The hidden name `.NAME.SUFFIX` next to `path`: same file system, so a rename between the two is atomic."""
    return path.with_name(f".{path.name}.{suffix}")


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
