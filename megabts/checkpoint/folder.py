"""One checkpoint folder: written whole or not at all, read with every byte checked.

All files go into the hidden folder `.NAME.tmp`, hashed while written and synced, by one process or by many; the
manifest comes last; a rename gives the folder its name. An older folder of that name waits as `.NAME.old` until the
new one is in place.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megabts.checkpoint.durable import FileRecord, beside, remove_tree, sync_folder, write_file
from megabts.checkpoint.manifest import MANIFEST, CheckpointError, MemberRecord, write_manifest
from megabts.checkpoint.pieces import Tables
from megabts.checkpoint.safetensors_writer import serialize, serialized_size

MANIFEST_ALLOWANCE = 1 << 16
"""Bytes reckoned for the manifest, the folders and the rounding to disk blocks."""

TensorFiles = Mapping[str, Mapping[str, torch.Tensor]]


def write_checkpoint(
    folder: Path,
    files: TensorFiles,
    blobs: Mapping[str, bytes],
    state: Mapping[str, Any],
    members: Sequence[MemberRecord] = (),
) -> None:
    """Write one checkpoint folder from one process, durably and all or nothing; an existing one is replaced.

    `files`: full tensors by file name, then by tensor name, on any device. `blobs`: contents of small files by name
    inside (`tokenizer/tokenizer.json`). `state`: JSON data. `members`: with absolute paths.
    Raises CheckpointError (no space, disk failure, bad name); nothing is left behind then.
    """
    folder = Path(folder)
    needed = space_needed(files, blobs)
    try:
        begin_folder(folder, [*files, *blobs], needed)
        records = write_files(folder, files, blobs, needed)
        finish_folder(folder, records, {}, state, members)
    except BaseException:
        abandon_folder(folder)
        raise


def begin_folder(folder: Path, names: Sequence[str], needed: int) -> None:
    """Make the empty hidden folder for the files `names`, of `needed` bytes. Raises CheckpointError."""
    _check_names(names, folder)
    aside = beside(folder, "tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(aside)
        if needed > shutil.disk_usage(folder.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        aside.mkdir()
        for inner in dict.fromkeys((aside / name).parent for name in names):
            inner.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_saved(error, folder, needed) from error


def write_files(folder: Path, files: TensorFiles, blobs: Mapping[str, bytes], needed: int) -> dict[str, FileRecord]:
    """Write these files into the hidden folder that `begin_folder` made; what the manifest must say of them.

    `needed`: bytes of the whole checkpoint, for the message. Raises CheckpointError, UserError for a bad tensor; the
    files of this call are gone then.
    """
    sources: dict[str, Iterable[bytes | memoryview]] = {name: serialize(tensors) for name, tensors in files.items()}
    sources |= {name: [content] for name, content in blobs.items()}
    aside, records = beside(folder, "tmp"), {}
    try:
        for name, chunks in sources.items():
            records[name] = write_file(aside / name, chunks)
    except BaseException as error:
        for name in sources:
            _remove(aside / name)
        if isinstance(error, OSError):
            raise _not_saved(error, folder, needed) from error
        raise
    return records


def finish_folder(
    folder: Path,
    records: Mapping[str, FileRecord],
    tables: Tables,
    state: Mapping[str, Any],
    members: Sequence[MemberRecord],
) -> None:
    """Add the manifest to the hidden folder, whose files are all written, and give it its name. Raises CheckpointError.

    `tables`: where the pieces of tensors are that lie in several files.
    """
    aside = beside(folder, "tmp")
    needed = sum(record.bytes for record in records.values()) + MANIFEST_ALLOWANCE
    try:
        write_manifest(aside, folder, records, state, members, tables)
        for inner in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
            sync_folder(inner)
        _publish(aside, folder)
    except OSError as error:
        raise _not_saved(error, folder, needed) from error


def abandon_folder(folder: Path) -> None:
    """Remove the hidden folder of a checkpoint that is not going to be finished."""
    shutil.rmtree(beside(folder, "tmp"), ignore_errors=True)


def space_needed(files: TensorFiles, blobs: Mapping[str, bytes]) -> int:
    """Bytes that a checkpoint of these files takes on disk."""
    sizes = [serialized_size(tensors) for tensors in files.values()]
    return sum(sizes) + sum(map(len, blobs.values())) + MANIFEST_ALLOWANCE


def _publish(aside: Path, folder: Path) -> None:
    """Rename a finished folder to its final name; an older one of that name waits under another name meanwhile."""
    old = beside(folder, "old")
    if folder.exists():
        remove_tree(old)
        os.rename(folder, old)
    try:
        os.rename(aside, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    sync_folder(folder.parent)
    remove_tree(old)


def _check_names(names: Sequence[str], folder: Path) -> None:
    for name in names:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or name in ("", ".", MANIFEST) or names.count(name) > 1:
            raise CheckpointError(f"checkpoint {folder}: '{name}' cannot be a file in it; use unique relative names")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the whole hidden folder goes next


def _not_saved(error: OSError, folder: Path, needed: int) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} not saved: {_reason(error, folder, needed)}")


def _reason(error: OSError, folder: Path, needed: int) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror or error} ({error.filename or folder.parent}); check the path and the disk"
    free = shutil.disk_usage(folder.parent).free
    sizes = f"needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB free at {folder.parent}"
    return f"no space ({sizes}); free some or keep fewer steps"
