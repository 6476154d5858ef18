"""What a parameter is, independent of the topology: how it starts and which slice of it a rank holds.

Every leaf module lists a `ParamMeta` for each of its parameters in `metas`. Initialisation, gradient sync, checkpoints
and export read it. A parameter starts from a full tensor drawn from a generator seeded by its *name*, of which a rank
keeps its slice; so models at different degrees are equal number by number.

A fused matrix (query-key-value, gate-up) is split part by part: `parts` counts the units of each part along `dim`, a
unit being `unit` rows (a head, or 1). A part with fewer units than ranks is held by several ranks (multi-query
attention).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from megabts.errors import UsageError, UserError
from megabts.parallel.mesh import Axis, ParallelMesh
from megabts.parallel.ranges import Range


@dataclass(frozen=True)
class ParamMeta:
    """How one parameter starts, and along which dimension it is split over which mesh axis."""

    shape: tuple[int, ...]
    """Shape of the full tensor."""
    init: Literal["normal", "constant", "identity"] = "constant"
    """identity: of matrices [.., m, n], each."""
    value: float = 0.0
    """Standard deviation of a normal start, or the constant."""
    dim: int | None = None
    """Dimension split over `axis`; None: every rank holds all of it."""
    axis: str = "tp"
    parts: tuple[int, ...] = ()
    """Units in each separately split part along `dim`; () is one part."""
    unit: int = 1
    summed: bool = False
    """Every rank of `axis` computes a part of the gradient, and the parts add up. So it is, without this mark, with
    rows that several ranks hold because a part has fewer units than there are ranks."""
    held: Range | None = None
    """Of the first dimension, which is not split otherwise, the range that this rank's mesh axis `experts` holds; None:
    all. Such a parameter's gradient is summed over the axis `replicas`, others' over dp."""

    def slices(self, axis: Axis) -> list[Range]:
        """Ranges [start, end) along `dim` that `axis.rank` holds, in order.

        Raises UsageError when a part divides neither way.
        """
        assert self.dim is not None
        start, ranges = 0, []
        for count in self.parts or (self.shape[self.dim] // self.unit,):
            first, last = _share(count, axis)
            ranges.append((start + first * self.unit, start + last * self.unit))
            start += count * self.unit
        assert start == self.shape[self.dim]
        return ranges

    def shard(self, full: Tensor, axis: Axis) -> Tensor:
        """This rank's slice of the full tensor."""
        if self.held:
            full = full[slice(*self.held)]
        if self.dim is None or axis.size == 1:
            return full
        return torch.cat([full.narrow(self.dim, a, b - a) for a, b in self.slices(axis)], self.dim)

    def local_shape(self, axis: Axis) -> tuple[int, ...]:
        """Shape of this rank's slice."""
        shape = list(self.shape)
        if self.dim is not None:
            shape[self.dim] = sum(b - a for a, b in self.slices(axis))
        if self.held:
            shape[0] = self.held[1] - self.held[0]
        return tuple(shape)

    def reduced_over(self, mesh: ParallelMesh) -> Axis:
        """The data-parallel ranks that hold the same slice, each with the gradient of its own samples."""
        return mesh.replicas if self.held else mesh.dp

    def replicated(self, axis: Axis) -> list[Range]:
        """Ranges of this rank's rows (along `dim`, or the first) that other ranks of `axis` hold too."""
        return self._shared_rows(axis, first_holder_too=True)

    def duplicates(self, axis: Axis) -> list[Range]:
        """Ranges of this rank's rows that a lower rank of `axis` holds already."""
        return self._shared_rows(axis, first_holder_too=False)

    def _shared_rows(self, axis: Axis, *, first_holder_too: bool) -> list[Range]:
        if axis.size == 1:
            return []
        if self.dim is None:
            return [(0, self.shape[0])] if first_holder_too or axis.rank > 0 else []
        ranges, start = [], 0
        for count in self.parts or (self.shape[self.dim] // self.unit,):
            first, last = _share(count, axis)
            rows = (last - first) * self.unit
            holders = axis.size // count if count < axis.size else 1
            if holders > 1 and (first_holder_too or axis.rank % holders):
                assert self.dim == 0, "columns are never held twice"
                ranges.append((start, start + rows))
            start += rows
        return ranges

    def initial(self, name: str, seed: int) -> Tensor:
        """The full tensor at the start, in float32: the same for every topology."""
        if self.init == "constant":
            return torch.full(self.shape, self.value)
        if self.init == "identity":
            return torch.eye(*self.shape[-2:]).expand(self.shape).contiguous()
        generator = torch.Generator().manual_seed(name_seed(name, seed))
        return torch.empty(self.shape).normal_(0.0, self.value, generator=generator)


def _share(count: int, axis: Axis) -> Range:
    """The units [first, last) of a part of `count` units that a rank holds."""
    if count % axis.size == 0:
        each = count // axis.size
        return axis.rank * each, (axis.rank + 1) * each
    if axis.size % count == 0:
        mine = axis.rank * count // axis.size
        return mine, mine + 1
    raise UsageError(
        f"{axis.name} degree {axis.size} neither divides nor is a multiple of {count} heads or columns; "
        "choose another degree in section parallel"
    )


def name_seed(name: str, seed: int) -> int:
    """A 63-bit seed from a name and the run's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def named_metas(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamMeta]]:
    """(name, parameter, meta) of every parameter of `module`, in order; tied ones once."""
    seen = set()
    for prefix, child in module.named_modules():
        for leaf, parameter in child.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}" if prefix else leaf, parameter, child.metas[leaf]


NamedParameters = Iterable[tuple[str, nn.Parameter, ParamMeta]]
Shapes = Mapping[str, tuple[int, ...]]
"""Full shapes by name."""


@torch.no_grad()
def initialise(parameters: NamedParameters, seed: int, mesh: ParallelMesh) -> None:
    """Set parameters to their start."""
    for name, parameter, meta in parameters:
        parameter.copy_(meta.shard(meta.initial(name, seed), mesh.axis(meta.axis)))


class SliceReader(Protocol):
    """Where tensors are read from by slices."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the full tensors, by name."""

    def read_slice(self, name: str, meta: ParamMeta, axis: Axis) -> Tensor:
        """What a rank of `axis` holds of the tensor."""
        ...


@torch.no_grad()
def load_full(
    parameters: NamedParameters,
    tensors: Iterable[tuple[str, Tensor]],
    mesh: ParallelMesh,
    source: str,
    whole: Shapes | None = None,
) -> None:
    """Copy full tensors, by name and one at a time, into this rank's slices of `parameters`.

    `whole`: full shapes of all parameters of the model of which `parameters` is a part; tensors of the other parts are
    passed over. Raises UserError naming `source` and the tensor when names or shapes differ.
    """
    mine = {name: (parameter, meta) for name, parameter, meta in parameters}
    waiting = dict(whole) if whole is not None else {name: meta.shape for name, (_, meta) in mine.items()}
    for name, tensor in tensors:
        if name not in waiting:
            raise UserError(f"{source} does not fit the model: it has {name}, which the model lacks or has had already")
        _check_shape(source, name, tensor.shape, waiting.pop(name))
        if name in mine:
            parameter, meta = mine[name]
            parameter.copy_(meta.shard(tensor, mesh.axis(meta.axis)))
    if waiting:
        raise UserError(f"{source} does not fit the model: it lacks {sorted(waiting)[0]} ({len(waiting)} such)")


@torch.no_grad()
def load_slices(parameters: NamedParameters, reader: SliceReader, mesh: ParallelMesh) -> None:
    """Copy this rank's slices into `parameters`, whose names and shapes were checked (`check_fit`)."""
    for name, parameter, meta in parameters:
        parameter.copy_(reader.read_slice(name, meta, mesh.axis(meta.axis)))


def check_fit(found: Shapes, whole: Shapes, source: str) -> None:
    """Raise UserError naming `source` unless the tensors it has are, by name and shape, those of a whole model."""
    for name, shape in found.items():
        if name not in whole:
            raise UserError(f"{source} does not fit the model: it has {name}, which the model lacks")
        _check_shape(source, name, shape, whole[name])
    missing = sorted(whole.keys() - found.keys())
    if missing:
        raise UserError(f"{source} does not fit the model: it lacks {missing[0]} ({len(missing)} such)")


def _check_shape(source: str, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise UserError(f"{source}: {name} has shape {tuple(found)}, the model {tuple(wanted)}")
