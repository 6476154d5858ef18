"""Assembling a BTS model from members kept elsewhere, and adding or removing an expert of a trained one.

A BTS checkpoint holds the stitches alone; its manifest names the members with their paths and content hashes. Adding
and removing work on the stitches' tensors by name and touch no member's weights and no other expert's slices.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from megabts.bts.model import member_of
from megabts.checkpoint.manifest import MemberRecord
from megabts.checkpoint.source import DenseSource, check_same_shape, load_weights, open_dense
from megabts.config.methods import HUB, BTSConfig
from megabts.errors import UsageError, UserError
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import Shapes, named_metas


def open_members(bts: BTSConfig, opened: Mapping[str, DenseSource] | None = None) -> dict[str, DenseSource]:
    """The folders of hub and experts, by member name, checked to fit together; those in `opened` are not read again.

    Raises UserError when one is missing, UsageError when they differ or the configuration names none.
    """
    if not bts.hub or not bts.experts:
        raise UsageError("method bts needs bts.hub DIR and at least one bts.experts.NAME DIR")
    bts.check_trainable()
    known = opened or {}
    sources = {name: known.get(name) or open_dense(path) for name, path in {HUB: bts.hub, **bts.experts}.items()}
    check_same_shape(sources)
    return sources


def member_records(sources: Mapping[str, DenseSource]) -> list[MemberRecord]:
    """What a checkpoint's manifest keeps of the members."""
    return [MemberRecord(name, str(s.folder.resolve()), s.content_hash) for name, s in sources.items()]


def with_members(bts: BTSConfig, folders: Mapping[str, Path]) -> BTSConfig:
    """The same configuration with the members at these folders (hub included)."""
    paths = {name: str(folder) for name, folder in folders.items()}
    return replace(bts, hub=paths.pop(HUB), experts=paths)


class HasMembers(Protocol):
    """A model of several dense ones."""

    members: nn.ModuleDict
    """Those of this rank, by name."""


def load_member(model: HasMembers, name: str, folder: Path, whole: Shapes, mesh: ParallelMesh) -> None:
    """Copy one member's weights into the model; those that it does not run here (an expert's final norm and head, other
    ranks' layers) are passed over.

    `whole`: full shapes of a whole dense model. Raises UserError when the folder holds another one.
    """
    load_weights(folder, named_metas(model.members[name]), whole, mesh)


def remove_expert(bts: BTSConfig, stitches: dict[str, Tensor], name: str) -> tuple[BTSConfig, dict[str, Tensor]]:
    """The model without expert `name`: its slices are dropped and the softmax renormalises over the others.

    `stitches` by parameter name (`stitches.J.KIND.MEMBER.weight`). Raises UserError.
    """
    if name not in bts.experts:
        raise UserError(f"there is no expert {name!r} to remove; the experts are {', '.join(bts.experts)}")
    if len(bts.experts) == 1:
        raise UserError(f"{name} is the only expert; without it the model is its hub, {bts.hub}")
    experts = {other: path for other, path in bts.experts.items() if other != name}
    kept = {key: tensor for key, tensor in stitches.items() if member_of(key) != name}
    return replace(bts, experts=experts, trainable=["*"]), kept


def add_expert(bts: BTSConfig, name: str, path: str, *, train_all: bool = False) -> BTSConfig:
    """The configuration with one more expert, whose projections and gate slices alone train (or all, `train_all`).

    The new slices start as in a new model: projections at identity, gates at zero. Raises UserError.
    """
    if name in bts.members:
        raise UserError(f"there is a member {name!r} already; remove it first or give the new one another name")
    return replace(bts, experts={**bts.experts, name: path}, trainable=["*"] if train_all else [name])
