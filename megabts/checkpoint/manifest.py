"""What a checkpoint folder says of itself: `manifest.json`.

It holds the format and program version, the training state (JSON), the members of a stitched model and, for every other
file, its sha256 and size, plus the sha256 of its own content. Where several ranks wrote, it says of every tensor which
of its elements lie in which file (see `pieces`). It is written last, so a folder with a valid manifest is a whole
checkpoint. Neither safetensors nor torch notices a flipped bit, so everything is checked here.
Weights of members are not copied: a member is recorded by place and content hash, and checked before use.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megabts
from megabts.checkpoint.durable import FileRecord, hash_chunks, read_chunks, write_file
from megabts.checkpoint.hf import hf_content_hash
from megabts.checkpoint.hf_config import is_hf_folder
from megabts.checkpoint.pieces import Tables, TensorRecord, tables_to_json
from megabts.errors import UserError

MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
FORMAT = 2
"""Newest format. 1: every tensor file holds full tensors, which stays so for what one rank wrote."""
OWN_HASH = "manifest_sha256"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or is damaged, incomplete or not what was recorded."""


@dataclass(frozen=True)
class MemberRecord:
    """A model that a stitched model is made of, kept where it is."""

    name: str
    """The member's name, e.g. `hub` or `code`."""
    path: str
    """Its folder. Absolute in memory; on disk relative to the checkpoint where both lie in one tree (`stored_path`)."""
    content_hash: str
    """`content_hash(path)` when the checkpoint was written."""


@dataclass(frozen=True)
class Manifest:
    """The parsed and verified `manifest.json`."""

    version: str
    """megabts version that wrote it."""
    state: dict[str, Any]
    """What the caller saved: step, consumed samples, ..."""
    members: tuple[MemberRecord, ...]
    """Members with absolute paths, in order."""
    files: dict[str, FileRecord]
    """Every other file of the folder, by its relative name."""
    tensors: Tables
    """Of each set of tensors that lies in several files, where; a set without an entry is one file of full tensors."""


def write_manifest(
    folder: Path,
    home: Path,
    files: Mapping[str, FileRecord],
    state: Mapping[str, Any],
    members: Sequence[MemberRecord],
    tensors: Tables,
) -> None:
    """Write `folder/manifest.json` for a checkpoint that is going to live at `home`. See `Manifest` for the rest."""
    content = {
        "format": FORMAT if tensors else 1,
        "megabts": megabts.__version__,
        "state": dict(state),
        "members": [{**asdict(member), "path": stored_path(Path(member.path), home)} for member in members],
        "files": {name: asdict(record) for name, record in files.items()},
    }
    if tensors:
        content["tensors"] = tables_to_json(tensors)
    try:
        content = json.loads(json.dumps(content))
    except TypeError as error:
        raise CheckpointError(
            f"state of checkpoint {home} is not plain JSON data: {error}; save numbers and text"
        ) from error
    write_file(folder / MANIFEST, [_render({**content, OWN_HASH: _own_hash(content)}).encode()])


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json` (not the files it lists).

    Raises CheckpointError when it is missing, changed in any byte, or of a newer format.
    """
    path = Path(folder) / MANIFEST
    try:
        text = path.read_bytes().decode()
        raw = json.loads(text)
        recorded = raw.pop(OWN_HASH)
        # The comparison of the text catches changes that mean the same in JSON, such as 1e-5 for 1E-5.
        intact = recorded == _own_hash(raw) and text == _render({**raw, OWN_HASH: recorded})
    except OSError as error:
        raise damaged(folder, MANIFEST, error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, MANIFEST, "not readable") from error
    if not intact:
        raise damaged(folder, MANIFEST, "its content does not match its own hash")
    if raw["format"] not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path} has format {raw['format']}, this megabts reads 1 to {FORMAT}; use megabts {raw['megabts']}"
        )
    members = [MemberRecord(**{**member, "path": _absolute(member["path"], folder)}) for member in raw["members"]]
    files = {name: FileRecord(**record) for name, record in raw["files"].items()}
    try:
        tensors = {
            name: {key: TensorRecord.from_json(key, record) for key, record in table.items()}
            for name, table in raw.get("tensors", {}).items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, MANIFEST, str(error)) from error
    return Manifest(raw["megabts"], raw["state"], tuple(members), files, tensors)


def verify(folder: Path) -> Manifest:
    """Check every byte of a checkpoint. Raises CheckpointError naming the first damaged file."""
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        verify_file(folder, name, record)
    return manifest


def verify_file(folder: Path, name: str, record: FileRecord) -> None:
    """Check one file of a checkpoint against its record: size first, because that costs nothing."""
    path = Path(folder) / name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise damaged(folder, name, f"{size} bytes instead of {record.bytes}")
        if hash_chunks(read_chunks(path)) != record.sha256:
            raise damaged(folder, name, "its content does not match its sha256")
    except OSError as error:
        raise damaged(folder, name, error.strerror or str(error)) from error


def content_hash(folder: Path) -> str:
    """One hash for the weights of a model folder: of its own model files and of its members. Reads the manifest only.

    The same weights in other files (saved by another number of ranks) have another hash. A Hugging Face folder has no
    manifest, so its files are read and hashed.
    """
    folder = Path(folder)
    if is_hf_folder(folder):
        return hf_content_hash(folder)
    manifest = read_manifest(folder)
    records = manifest.tensors.get(MODEL_FILE, {}).values()
    names = {piece.file for record in records for piece in record.pieces} or {MODEL_FILE}
    if not names <= manifest.files.keys():
        raise damaged(folder, min(names), "the manifest does not list it")
    files = [manifest.files[name].sha256 for name in sorted(names)]
    parts = [*files, *(member.content_hash for member in manifest.members)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_member(record: MemberRecord, checkpoint_folder: Path) -> Path:
    """The member's folder, after checking that its weights are the recorded ones. Raises CheckpointError."""
    path = Path(_absolute(record.path, checkpoint_folder))
    where = f"member '{record.name}' of {checkpoint_folder}"
    if not path.is_dir():
        raise CheckpointError(f"{where} is not at {path} any more; move it back, or stitch again from its new place")
    found = content_hash(path)
    if found != record.content_hash:
        raise CheckpointError(
            f"{where} has changed: {path} has content {found[:12]}, recorded was {record.content_hash[:12]}; "
            "restore the recorded weights, or stitch again"
        )
    return path


def stored_path(member: Path, home: Path) -> str:
    """How a member's path is written into the manifest of the checkpoint at `home` (RUNS/RUN/STEP).

    Members below RUNS are written relative to the checkpoint, so that RUNS can move as a whole; others absolute.
    """
    member, home = member.resolve(), home.resolve()
    tree = home.parent.parent
    if tree != Path(tree.anchor) and member.is_relative_to(tree):
        return os.path.relpath(member, home)
    return str(member)


def _absolute(path: str, folder: Path) -> str:
    return str((Path(folder).resolve() / path).resolve())


def _own_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_render(content).encode()).hexdigest()


def _render(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def damaged(folder: Path, name: str, why: str) -> CheckpointError:
    """The error for something in a checkpoint that is not as it was written."""
    return CheckpointError(f"checkpoint {folder} is damaged: {name}: {why}; use another step or restore the file")
