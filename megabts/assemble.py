"""Checkpoints made from checkpoints, without training: a BTS model from members, an expert added or removed, a soup."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megabts.bts.build import add_expert, member_records, open_members, remove_expert
from megabts.bts.model import BTSModel
from megabts.build import describe, make_backend
from megabts.checkpoint.folder import load_tensors, write_checkpoint
from megabts.checkpoint.manifest import MODEL_FILE, MemberRecord
from megabts.checkpoint.source import CONFIG_FILE, TOKENIZER_FOLDER, DenseSource, check_same_shape, open_dense
from megabts.config.load import to_yaml
from megabts.config.methods import HUB, BTSConfig
from megabts.config.run import RunConfig
from megabts.errors import UserError
from megabts.merge.soup import average
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.device import DTYPES

TOKENIZER_FILES = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "tokenizer_spec.json"}

SEED = 0
"""Stitches start from constants and identities: the seed of their start decides nothing."""


def stitch(bts: BTSConfig, out: Path, *, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write an untrained BTS model of `bts.hub` and `bts.experts` to `out`. Raises UserError."""
    sources = open_members(bts)
    config = RunConfig(method="bts", model=sources[HUB].config, bts=bts)
    config = replace(config, precision=replace(config.precision, dtype=dtype))
    _write(out, config, _initial(config, {}), sources)


def add(checkpoint: Path, name: str, path: str, out: Path, *, train_all: bool = False) -> None:
    """Write the BTS model `checkpoint` with one more expert to `out`; all its other slices stay as they are.

    Training from `out` then trains the new expert's slices alone, or all with `train_all`. Raises UserError.
    """
    config, stitches = _open_bts(checkpoint)
    config = replace(config, bts=add_expert(config.bts, name, path, train_all=train_all))
    _write(out, config, _initial(config, stitches), open_members(config.bts))


def remove(checkpoint: Path, name: str, out: Path) -> None:
    """Write the BTS model `checkpoint` without expert `name` to `out`. It runs at once. Raises UserError."""
    config, stitches = _open_bts(checkpoint)
    bts, kept = remove_expert(config.bts, stitches, name)
    config = replace(config, bts=bts)
    _write(out, config, kept, open_members(bts))


def soup(members: Mapping[str, tuple[str, float]], out: Path) -> None:
    """Write the weighted average of dense models {name: (folder, weight)} to `out`, a dense model. Raises UserError."""
    sources = {name: open_dense(path) for name, (path, _) in members.items()}
    check_same_shape(sources)
    weights = [weight for _, weight in members.values()]
    merged = average([dict(source.weights()) for source in sources.values()], weights)
    config = RunConfig(model=next(iter(sources.values())).config)
    _write(out, config, merged, sources, keep_members=False)


def _open_bts(checkpoint: Path) -> tuple[RunConfig, dict[str, Tensor]]:
    config, folder, _ = describe(checkpoint)
    if config.method != "bts":
        raise UserError(f"{folder} holds a model of method {config.method}; only a BTS model has experts")
    return config, load_tensors(folder, MODEL_FILE)


def _initial(config: RunConfig, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All stitch tensors of `config`: the known ones, and the others at their start."""
    mesh = ParallelMesh()
    dtype = DTYPES[config.precision.dtype]
    model = BTSModel(config.model, config.bts, make_backend(config, mesh, dtype, "meta"), mesh.tp)
    return {
        name: known[name] if name in known else meta.initial(name, SEED).to(dtype)
        for name, _, meta in model.own_parameters()
    }


def _write(
    out: Path,
    config: RunConfig,
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, DenseSource],
    *,
    keep_members: bool = True,
) -> None:
    """A checkpoint folder of `config` at `out`, with the first member's tokenizer."""
    if out.exists():
        raise UserError(f"{out} exists already; give another --out or remove it first")
    first = next(iter(sources.values()))
    files = {}
    if first.tokenizer:
        names = TOKENIZER_FILES & {path.name for path in Path(first.tokenizer).iterdir()}
        files = {f"{TOKENIZER_FOLDER}/{name}": Path(first.tokenizer) / name for name in sorted(names)}
    state: dict[str, Any] = {"step": 0, "tokenizer_fingerprint": first.tokenizer_fingerprint}
    records: list[MemberRecord] = member_records(dict(sources)) if keep_members else []
    write_checkpoint(out, {MODEL_FILE: tensors}, {CONFIG_FILE: to_yaml(config)}, state, records, files)
