"""One checkpoint folder: written whole or not at all, read with every byte checked.

All files go into the hidden folder `.NAME.tmp`, hashed while written and synced; the manifest comes last; a rename
gives the folder its name. An older folder of that name waits as `.NAME.old` until the new one is in place.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megabts.checkpoint.durable import beside, remove_tree, sync_folder, write_file
from megabts.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    MemberRecord,
    read_manifest,
    write_manifest,
)
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
    """Write one checkpoint folder, durably and all or nothing; an existing one of that name is replaced.

    `files`: tensors by file name, then by tensor name, on any device. `blobs`: contents of small files by name inside
    (`tokenizer/tokenizer.json`). `state`: JSON data. `members`: with absolute paths.
    Raises CheckpointError (no space, disk failure, bad name); nothing is left behind then.
    """
    folder = Path(folder)
    _check_names([*files, *blobs], folder)
    sources: dict[str, Iterable[bytes | memoryview]] = {name: serialize(tensors) for name, tensors in files.items()}
    sources |= {name: [content] for name, content in blobs.items()}
    aside = beside(folder, "tmp")
    needed = 0
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(aside)
        needed = _space_needed(files, blobs)
        if needed > shutil.disk_usage(folder.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        aside.mkdir()
        records = {}
        for name, chunks in sources.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            records[name] = write_file(aside / name, chunks)
        write_manifest(aside, folder, records, state, members)
        for inner in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
            sync_folder(inner)
        _publish(aside, folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"checkpoint {folder} not saved: {_reason(error, folder, needed)}") from error
        raise


def load_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Tensors of the file `name` of a verified checkpoint (`resolve`), on the CPU.

    Raises CheckpointError when the manifest does not list it, or it is no safetensors file.
    """
    folder = Path(folder)
    if name not in read_manifest(folder).files:
        raise CheckpointError(f"checkpoint {folder} was saved without {name}; use another one or do not ask for it")
    try:
        with safe_open(folder / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {name}: {error}; use another step") from error


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


def _space_needed(files: TensorFiles, blobs: Mapping[str, bytes]) -> int:
    """Bytes the checkpoint takes on disk."""
    sizes = [serialized_size(tensors) for tensors in files.values()]
    return sum(sizes) + sum(map(len, blobs.values())) + MANIFEST_ALLOWANCE


def _reason(error: OSError, folder: Path, needed: int) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror or error} ({error.filename or folder.parent}); check the path and the disk"
    free = shutil.disk_usage(folder.parent).free
    sizes = f"needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB free at {folder.parent}"
    return f"no space ({sizes}); free some or keep fewer steps"
