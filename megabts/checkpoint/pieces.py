"""Which elements of which tensor lie in which file, when several ranks write one checkpoint.

A *region* says which elements of a full tensor one stored tensor holds, in the words of `ParamMeta`: ranges along one
dimension (several for a fused query-key-value matrix) laid one after another give a rank's local tensor; of that,
flattened, an interval is stored (an optimizer shard over data-parallel ranks). Every element of a full tensor lies in
exactly one region, whatever the topology was, so any other topology can be read from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from megabts.parallel.mesh import Axis
from megabts.parallel.ranges import Range, joined, overlap, without
from megabts.parallel.sharding import ParamMeta


@dataclass(frozen=True)
class Region:
    """Which elements of a full tensor; the default is all of them."""

    dim: int = 0
    ranges: tuple[Range, ...] = ()
    """Ranges [a, b) along `dim`, in the order they are stored; () is all of it."""
    flat: Range | None = None
    """Elements [x, y) of the flattened local tensor; None: all."""

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the ranges laid one after another, of a full tensor of `shape`."""
        if not self.ranges:
            return tuple(shape)
        return (*shape[: self.dim], sum(b - a for a, b in self.ranges), *shape[self.dim + 1 :])

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape in the file: the local tensor's, or one dimension where it is an interval of it."""
        return (self.flat[1] - self.flat[0],) if self.flat else self.local_shape(shape)

    def interval(self, shape: Sequence[int]) -> Range:
        """Elements [x, y) of the flattened local tensor."""
        return self.flat or (0, prod(self.local_shape(shape)))

    def segments(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """(start, stop, offset): elements [start, stop) of the flat full tensor lie from `offset` on in the stored one.

        For regions of whole rows only (`dim` 0, or everything).
        """
        x, y = self.interval(shape)
        if not self.ranges:
            return [(x, y, 0)]
        assert self.dim == 0
        row, passed, found = prod(shape[1:]), 0, []
        for a, b in self.ranges:
            first, last = overlap((x, y), (passed, passed + (b - a) * row))
            if first < last:
                shift = a * row - passed
                found.append((first + shift, last + shift, first - x))
            passed += (b - a) * row
        return found


WHOLE = Region()


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one tensor, ready to be saved."""

    name: str
    meta: ParamMeta
    axis: Axis
    tensor: Tensor
    """The local tensor, or its elements `flat`, one after another."""
    flat: Range | None = None


def region_of(meta: ParamMeta, axis: Axis, flat: Range | None = None) -> Region:
    """What a rank of `axis` holds of a parameter, or of that the elements `flat` of the flattened local tensor.

    Of a parameter whose first dimension is divided too (`held`) it holds an interval of what a rank that holds all of
    that dimension would.
    """
    ranges = joined(meta.slices(axis)) if meta.dim is not None else []
    if meta.dim is None or ranges == [(0, meta.shape[meta.dim])]:
        region = WHOLE
    else:
        region = Region(meta.dim, tuple(ranges))
    if meta.held:
        row = prod(region.local_shape(meta.shape)[1:])
        begin, end = meta.held[0] * row, meta.held[1] * row
        flat = (begin + flat[0], begin + flat[1]) if flat else (begin, end)
    if flat is None or flat == region.interval(meta.shape):
        return region
    return Region(region.dim, region.ranges, flat)


@dataclass(frozen=True)
class Fragment:
    """One tensor to store: a piece, or an interval of what is left of it without the rows that another rank saves."""

    name: str
    shape: tuple[int, ...]
    """Of the full tensor."""
    region: Region
    tensor: Tensor


def fragments_of(piece: Piece) -> list[Fragment]:
    """A piece without the rows that a lower rank of its axis holds too, in as few intervals as there are gaps."""
    region = region_of(piece.meta, piece.axis, piece.flat)
    shape = piece.meta.shape
    x, y = region.interval(shape)
    local = region.local_shape(shape)
    row = prod(local[1:])
    duplicates = piece.meta.duplicates(piece.axis)
    kept = list(without((x, y), [(a * row, b * row) for a, b in duplicates]))
    if not prod(shape):
        kept = [] if duplicates else [(x, y)]
    if kept == [(x, y)]:
        return [Fragment(piece.name, shape, region, piece.tensor.reshape(region.stored_shape(shape)))]
    flat = piece.tensor.reshape(-1)
    return [
        Fragment(piece.name, shape, Region(region.dim, region.ranges, (u, v)), flat[u - x : v - x]) for u, v in kept
    ]


@dataclass(frozen=True)
class Placed:
    """Where one region lies."""

    file: str
    key: str
    """The stored tensor's name in the file."""
    region: Region


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint: its shape, and where its elements lie."""

    shape: tuple[int, ...]
    pieces: tuple[Placed, ...]

    def to_json(self, name: str) -> dict[str, Any]:
        """Plain data for the manifest; what follows from the tensor's name and shape is left out."""
        pieces = []
        for piece in self.pieces:
            entry: dict[str, Any] = {"file": piece.file}
            if piece.key != name:
                entry["key"] = piece.key
            if piece.region.ranges:
                entry |= {"dim": piece.region.dim, "ranges": [list(pair) for pair in piece.region.ranges]}
            if piece.region.flat:
                entry["flat"] = list(piece.region.flat)
            pieces.append(entry)
        return {"shape": list(self.shape), "pieces": pieces}

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> "TensorRecord":
        """The reverse. Raises ValueError when the pieces cannot be the tensor's."""
        shape = tuple(data["shape"])
        pieces = []
        for entry in data["pieces"]:
            ranges = tuple((a, b) for a, b in entry.get("ranges", ()))
            flat = (entry["flat"][0], entry["flat"][1]) if "flat" in entry else None
            pieces.append(Placed(entry["file"], entry.get("key", name), Region(entry.get("dim", 0), ranges, flat)))
        record = cls(shape, tuple(pieces))
        record.check(name)
        return record

    def check(self, name: str) -> None:
        """Raise ValueError unless every piece lies inside the tensor and their elements count up to all of it."""
        count = 0
        for piece in self.pieces:
            region = piece.region
            inside = 0 <= region.dim < max(len(self.shape), 1)
            inside = inside and all(0 <= a < b <= self.shape[region.dim] for a, b in region.ranges)
            if not inside or (region.flat and not 0 <= region.flat[0] < region.flat[1]):
                raise ValueError(f"{name} has a piece in {piece.file} that lies outside of it")
            x, y = region.interval(self.shape)
            if y > prod(region.local_shape(self.shape)):
                raise ValueError(f"{name} has a piece in {piece.file} that lies outside of it")
            count += y - x
        if not self.pieces or count != prod(self.shape):
            raise ValueError(f"{name}: its pieces hold {count} of {prod(self.shape)} elements")


Tables = Mapping[str, Mapping[str, TensorRecord]]
"""Of every set of tensors that lies in several files: the records, by the set's name and the tensor's."""


def tables_to_json(tables: Tables) -> dict[str, dict[str, Any]]:
    """Plain data for the manifest."""
    return {name: {key: record.to_json(key) for key, record in table.items()} for name, table in tables.items()}


Offer = tuple[str, tuple[int, ...], Region]
"""A fragment without its values: what a rank tells the others."""


@dataclass(frozen=True)
class Plan:
    """Who writes what: of the ranks that offer the same region, the first one."""

    chosen: Mapping[str, Mapping[int, tuple[str, str]]]
    """Of this rank: set -> number of the fragment in its offer -> (file, key)."""
    tables: Tables

    def tensors(self, fragments: Mapping[str, Sequence[Fragment]]) -> dict[str, dict[str, Tensor]]:
        """This rank's tensors by file and key, of the fragments that it offered."""
        files: dict[str, dict[str, Tensor]] = {}
        for name, places in self.chosen.items():
            for number, (file, key) in places.items():
                files.setdefault(file, {})[key] = fragments[name][number].tensor
        return files


def offer(fragments: Mapping[str, Iterable[Fragment]]) -> dict[str, list[Offer]]:
    """What a rank could write, for `make_plan`."""
    return {name: [(one.name, one.shape, one.region) for one in found] for name, found in fragments.items()}


def make_plan(offers: Sequence[Mapping[str, Sequence[Offer]]], rank: int) -> Plan:
    """Share the writing out: `offers` of all ranks, by set (`model.safetensors`); every rank makes the same plan.

    A set that one rank holds whole is one file of full tensors under the set's name; else each rank's share is in
    `model-RANK.safetensors`. Raises ValueError when a tensor's pieces do not make it up.
    """
    chosen: dict[str, dict[int, tuple[str, str]]] = {}
    tables: dict[str, dict[str, TensorRecord]] = {}
    for name in dict.fromkeys(name for mine in offers for name in mine):
        taken: dict[tuple[str, Region], tuple[int, int]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for holder, mine in enumerate(offers):
            for number, (tensor, shape, region) in enumerate(mine.get(name, ())):
                taken.setdefault((tensor, region), (holder, number))
                shapes.setdefault(tensor, shape)
        whole = len({holder for holder, _ in taken.values()}) <= 1 and all(r == WHOLE for _, r in taken)
        places: dict[str, list[Placed]] = {tensor: [] for tensor in shapes}
        used: dict[tuple[int, str], int] = {}
        for (tensor, region), (holder, number) in taken.items():
            count = used[holder, tensor] = used.get((holder, tensor), 0) + 1
            key = tensor if count == 1 else f"{tensor}#{count}"
            file = name if whole else _shard_name(name, holder)
            places[tensor].append(Placed(file, key, region))
            if holder == rank:
                chosen.setdefault(name, {})[number] = (file, key)
        records = {tensor: TensorRecord(shapes[tensor], tuple(found)) for tensor, found in places.items()}
        for tensor, record in records.items():
            record.check(tensor)
        if not whole:
            tables[name] = records
    return Plan(chosen, tables)


def _shard_name(name: str, rank: int) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{rank:05d}{dot}{suffix}"
