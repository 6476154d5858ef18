"""Tensors of a checkpoint, one at a time, whole or a rank's slice, whatever topology wrote them.

Files are mapped, not read: a rank that has the place of a writer touches the bytes of its own pieces alone. Another one
puts its slice together from the pieces it meets; where a tensor is split along columns, that takes the memory of one
full tensor.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megabts.checkpoint.manifest import CheckpointError, damaged, read_manifest
from megabts.checkpoint.pieces import WHOLE, Placed, Region, TensorRecord, region_of
from megabts.parallel.mesh import Axis
from megabts.parallel.ranges import Range
from megabts.parallel.sharding import ParamMeta


class TensorReader:
    """Context manager over the set of tensors `name` (`model.safetensors`) of a verified checkpoint (`resolve`).

    Attributes:
        shapes: of the full tensors, by name.

    Raises CheckpointError when the checkpoint has no such set, or a file is not what the manifest says.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        manifest = read_manifest(self.folder)
        if name in manifest.tensors:
            self._records: Mapping[str, TensorRecord] = manifest.tensors[name]
        elif name in manifest.files:
            keys = self._open(name).keys()
            self._records = {key: TensorRecord(self._shape(name, key), (Placed(name, key, WHOLE),)) for key in keys}
        else:
            raise CheckpointError(f"checkpoint {folder} was saved without {name}; use another one or do not ask for it")
        self.shapes: Mapping[str, tuple[int, ...]] = {key: record.shape for key, record in self._records.items()}

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def read(self, name: str) -> Tensor:
        """The full tensor, on the CPU, in the stored type; maybe a private mapping of the file, fit to change."""
        return self._read(name, WHOLE)

    def read_slice(self, name: str, meta: ParamMeta, axis: Axis, flat: Range | None = None) -> Tensor:
        """What a rank of `axis` holds of it; or of that, flattened, the elements `flat`, in one dimension."""
        return self._read(name, region_of(meta, axis, flat)).reshape((-1,) if flat else meta.local_shape(axis))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All full tensors, one after another."""
        return ((name, self.read(name)) for name in self._records)

    def _read(self, name: str, region: Region) -> Tensor:
        record = self._records[name]
        for piece in record.pieces:
            if piece.region == region:
                return self._stored(piece, record.shape)
        alike = [p for p in record.pieces if (p.region.dim, p.region.ranges) == (region.dim, region.ranges)]
        if sum(_size(p.region, record.shape) for p in alike) == prod(region.local_shape(record.shape)):
            return self._from_shards(name, record, alike, region)
        if all(r.dim == 0 or not r.ranges for r in (region, *(piece.region for piece in record.pieces))):
            return self._from_rows(name, record, region)
        full = self._from_columns(name, record, region)
        if region.ranges:
            full = torch.cat([full.narrow(region.dim, a, b - a) for a, b in region.ranges], region.dim)
        return full.reshape(-1)[slice(*region.flat)] if region.flat else full

    def _from_shards(self, name: str, record: TensorRecord, shards: list[Placed], region: Region) -> Tensor:
        """Of the local tensor that `shards` are intervals of, the interval that `region` asks for."""
        x, y = region.interval(record.shape)
        return self._overlaps(
            name, record, region, [(x, y, 0)], {p: [(*p.region.interval(record.shape), 0)] for p in shards}
        )

    def _from_rows(self, name: str, record: TensorRecord, region: Region) -> Tensor:
        """From whole rows, which are intervals of the flat full tensor."""
        segments = {piece: piece.region.segments(record.shape) for piece in record.pieces}
        return self._overlaps(name, record, region, region.segments(record.shape), segments)

    def _overlaps(
        self,
        name: str,
        record: TensorRecord,
        region: Region,
        wanted: list[tuple[int, int, int]],
        given: Mapping[Placed, list[tuple[int, int, int]]],
    ) -> Tensor:
        """Copy what the segments `wanted` and those `given` by pieces have in common, in the same coordinates."""
        out, copied = None, 0
        for piece, segments in given.items():
            found = [
                (max(a, u), min(b, v), to - a, at - u)
                for u, v, at in segments
                for a, b, to in wanted
                if max(a, u) < min(b, v)
            ]
            if not found:
                continue
            stored = self._stored(piece, record.shape).reshape(-1)
            if out is None:
                out = torch.empty(_size(region, record.shape), dtype=stored.dtype)
            for first, last, to, at in found:
                out[first + to : last + to] = stored[first + at : last + at]
                copied += last - first
        if out is None or copied != len(out):
            raise damaged(self.folder, name, "its pieces do not make it up")
        return out.view(region.stored_shape(record.shape))

    def _from_columns(self, name: str, record: TensorRecord, region: Region) -> Tensor:
        """The full tensor, of which only the ranges that `region` asks for are filled in."""
        full: Tensor | None = None
        for dim, ranges in dict.fromkeys((piece.region.dim, piece.region.ranges) for piece in record.pieces):
            if dim == region.dim and not _meet(ranges, region.ranges):
                continue
            local = self._read(name, Region(dim, ranges))
            if not ranges:
                return local
            if full is None:
                full = torch.empty(record.shape, dtype=local.dtype)
            start = 0
            for a, b in ranges:
                full.narrow(dim, a, b - a).copy_(local.narrow(dim, start, b - a))
                start += b - a
        assert full is not None
        return full

    def _stored(self, piece: Placed, shape: tuple[int, ...]) -> Tensor:
        """One stored tensor, mapped."""
        try:
            tensor: Tensor = self._open(piece.file).get_tensor(piece.key)
        except (SafetensorError, OSError) as error:
            raise damaged(self.folder, piece.file, str(error)) from error
        if tuple(tensor.shape) != piece.region.stored_shape(shape):
            raise damaged(self.folder, piece.file, f"{piece.key} has shape {tuple(tensor.shape)}")
        return tensor

    def _shape(self, file: str, key: str) -> tuple[int, ...]:
        return tuple(self._open(file).get_slice(key).get_shape())

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise damaged(self.folder, file, str(error)) from error
        return self._files[file]


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """All full tensors of the set `name` of a verified checkpoint (`resolve`), on the CPU.

    Raises CheckpointError when the checkpoint has no such set, or a file is not what the manifest says.
    """
    with TensorReader(folder, name) as reader:
        return dict(reader.items())


def _size(region: Region, shape: tuple[int, ...]) -> int:
    x, y = region.interval(shape)
    return y - x


def _meet(ones: tuple[Range, ...], others: tuple[Range, ...]) -> bool:
    """Whether ranges along one dimension have something in common; () is all of it."""
    return not ones or not others or any(max(a, u) < min(b, v) for a, b in ones for u, v in others)
