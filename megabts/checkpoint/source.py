"""A folder with one dense model's weights, as a hub, an expert or a start: a megabts or a Hugging Face checkpoint."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from megabts.checkpoint.hf import weights_from_hf
from megabts.checkpoint.hf_config import config_from_hf, is_hf_folder
from megabts.checkpoint.manifest import MODEL_FILE, MemberRecord, check_member, content_hash, read_manifest
from megabts.checkpoint.reader import TensorReader
from megabts.checkpoint.storage import resolve
from megabts.config.load import from_yaml
from megabts.config.model import ModelConfig
from megabts.errors import UsageError, UserError
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import NamedParameters, Shapes, check_fit, load_full, load_slices
from megabts.tokenizers.build import find_tokenizer

CONFIG_FILE = "config.yaml"
MODEL_FREE = {"preset", "init_std", "max_seq_len", "cross_document_attention"}
"""Model settings that do not change what weights compute from one document: members may differ in them, and a run may
choose them anew for weights that exist (by default they stay as they were)."""


@dataclass(frozen=True)
class DenseSource:
    """Where a dense model's weights lie, and what they are."""

    folder: Path
    """The checkpoint folder itself (a run folder is resolved to its latest step) or a Hugging Face folder."""
    config: ModelConfig
    content_hash: str
    tokenizer: str
    """The tokenizer's folder, or "" when the folder has none."""
    tokenizer_fingerprint: str
    """"" when unknown."""

    def weights(self, order: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """All full parameters by megabts name, one at a time, in the stored type; in this `order`, if given."""
        if is_hf_folder(self.folder):
            yield from weights_from_hf(self.folder, order)
        else:
            with TensorReader(self.folder, MODEL_FILE) as reader:
                yield from ((name, reader.read(name)) for name in order or reader.shapes)


def load_weights(folder: Path, parameters: NamedParameters, whole: Shapes, mesh: ParallelMesh) -> None:
    """Copy the weights of a verified checkpoint or Hugging Face folder into this rank's slices of `parameters`.

    `whole`: full shapes of the model that `parameters` is a part of, or a pruned form of; the folder must hold exactly
    these. Raises UserError before anything is copied (from a Hugging Face folder: while it is).
    """
    if is_hf_folder(folder):
        load_full(parameters, weights_from_hf(folder), mesh, str(folder), whole)
        return
    with TensorReader(folder, MODEL_FILE) as reader:
        check_fit(reader.shapes, whole, str(folder))
        load_slices(parameters, reader, mesh)


def open_dense(path: str | Path, known_hash: str = "") -> DenseSource:
    """The dense model in a megabts run or checkpoint folder, or in a Hugging Face folder. Reads all its bytes.

    `known_hash`: its content hash where that was just computed. Raises UserError when there is no model, or the
    checkpoint is of a stitched one.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a checkpoint, a run folder or a Hugging Face folder")
    if is_hf_folder(folder):
        config = config_from_hf(folder)
        return DenseSource(folder, config, known_hash or content_hash(folder), find_tokenizer(folder), "")
    folder = resolve(folder)
    run = from_yaml((folder / CONFIG_FILE).read_text(), str(folder / CONFIG_FILE))
    if run.method != "dense":
        raise UserError(f"{folder} holds a model of method {run.method}, not a dense one; members must be dense models")
    fingerprint = read_manifest(folder).state.get("tokenizer_fingerprint", "")
    return DenseSource(folder, run.model, content_hash(folder), find_tokenizer(folder), fingerprint)


def open_member(record: MemberRecord, checkpoint: Path) -> DenseSource:
    """The member that a checkpoint's manifest records. Raises UserError when it is not there, damaged or changed."""
    return open_dense(check_member(record, checkpoint), record.content_hash)


def check_same_shape(sources: dict[str, DenseSource]) -> None:
    """Refuse members whose models differ, with a table of the differing fields and what each member has.

    Raises UsageError also when two members are one and the same.
    """
    rows: dict[str, list[Any]] = {
        field.name: [getattr(source.config, field.name) for source in sources.values()]
        for field in fields(ModelConfig)
        if field.name not in MODEL_FREE
    }
    rows["tokenizer"] = [source.tokenizer_fingerprint[:12] for source in sources.values()]
    known = {name: [value for value in values if value != "" or name != "tokenizer"] for name, values in rows.items()}
    differing = {name: rows[name] for name, values in known.items() if any(value != values[0] for value in values)}
    if differing:
        table = [["", *sources], *[[name, *map(str, values)] for name, values in differing.items()]]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        raise UsageError("the members differ and cannot be combined:\n" + "\n".join(line.rstrip() for line in lines))
    owners: dict[str, str] = {}
    for name, source in sources.items():
        other = owners.setdefault(source.content_hash, name)
        if other != name:
            raise UsageError(
                f"members {other} and {name} have the same weights ({source.folder}); give each its own model"
            )
