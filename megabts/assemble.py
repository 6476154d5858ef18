"""Checkpoints made from checkpoints, without training: a BTS model from members, an expert added or removed, an
ensemble, a router at its start, a soup.

Every function writes a new checkpoint folder and returns its configuration; it refuses a folder that exists before it
reads anything.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megabts.bts.build import add_expert, member_records, open_members, remove_expert
from megabts.bts.model import BTSModel
from megabts.build import StoredModel, make_backend, open_model, whole_model
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import MODEL_FILE, MemberRecord
from megabts.checkpoint.reader import load_tensors
from megabts.checkpoint.source import CONFIG_FILE, check_same_shape, open_dense
from megabts.config.load import to_yaml
from megabts.config.methods import HUB, BTMConfig, BTSConfig, RoutingConfig
from megabts.config.run import PrecisionConfig, RunConfig
from megabts.errors import UserError
from megabts.merge.members import open_folders
from megabts.merge.soup import average
from megabts.moe.upcycle import open_dense_members, write_upcycled
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.device import resolve_dtype
from megabts.tokenizers.build import build_tokenizer, find_tokenizer
from megabts.tokenizers.protocol import checkpoint_files

SEED = 0
"""Stitches start from constants and identities: the seed of their start decides nothing."""


def stitch(bts: BTSConfig, out: Path, *, dtype: Literal["float32", "bfloat16"] = "float32") -> RunConfig:
    """Write an untrained BTS model of `bts.hub` and `bts.experts` to `out`. Raises UserError."""
    _check_free(out)
    sources = open_members(bts)
    config = RunConfig(method="bts", model=sources[HUB].config, bts=bts)
    config = replace(config, precision=replace(config.precision, dtype=dtype))
    return _write(out, config, _initial(config, {}), member_records(sources), sources[HUB].tokenizer)


def add(checkpoint: Path, name: str, path: str, out: Path, *, train_all: bool = False) -> RunConfig:
    """Write the BTS model `checkpoint` with one more expert to `out`; all its other slices stay as they are.

    Training from `out` then trains the new expert's slices alone, or all with `train_all`. Raises UserError.
    """
    _check_free(out)
    stored = _open_bts(checkpoint)
    config = replace(stored.config, bts=add_expert(stored.config.bts, name, path, train_all=train_all))
    sources = open_members(config.bts, stored.members)
    stitches = _initial(config, load_tensors(stored.folder, MODEL_FILE))
    return _write(out, config, stitches, member_records(sources), _tokenizer(stored))


def remove(checkpoint: Path, name: str, out: Path) -> RunConfig:
    """Write the BTS model `checkpoint` without expert `name` to `out`. It runs at once. Raises UserError."""
    _check_free(out)
    stored = _open_bts(checkpoint)
    bts, kept = remove_expert(stored.config.bts, load_tensors(stored.folder, MODEL_FILE), name)
    records = member_records(open_members(bts, stored.members))
    return _write(out, replace(stored.config, bts=bts), kept, records, _tokenizer(stored))


def soup(members: Mapping[str, tuple[str, float]], out: Path) -> RunConfig:
    """Write the weighted average of dense models {name: (folder, weight)} to `out`, a dense model. Raises UserError."""
    _check_free(out)
    sources = {name: open_dense(path) for name, (path, _) in members.items()}
    check_same_shape(sources)
    weights = [weight for _, weight in members.values()]
    merged = average([dict(source.weights()) for source in sources.values()], weights)
    first = next(iter(sources.values()))
    return _write(out, RunConfig(model=first.config), merged, [], first.tokenizer)


def combine(
    method: Literal["btm", "routing"],
    members: Mapping[str, str],
    out: Path,
    *,
    top_k: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> RunConfig:
    """Write the ensemble (btm) or the untrained router (routing) of members {name: folder} to `out`.

    `top_k`: of the ensemble. The members stay where they are. Raises UserError.
    """
    _check_free(out)
    sources = open_folders(method, members)
    first = next(iter(sources.values()))
    config = RunConfig(method=method, model=first.config, precision=PrecisionConfig(dtype=dtype))
    if method == "btm":
        config = replace(config, btm=BTMConfig(dict(members), top_k))
    else:
        config = replace(config, routing=RoutingConfig(dict(members)))
    exact = resolve_dtype(dtype, torch.device("cpu"))
    tensors = {name: meta.initial(name, SEED).to(exact) for name, _, meta in whole_model(config).own_parameters()}
    return _write(out, config, tensors, member_records(sources), first.tokenizer)


def upcycle(
    config: RunConfig, out: Path, *, seed: int = 0, watch: Callable[[int, int], None] = lambda done, total: None
) -> RunConfig:
    """Write the MoE model of `config.moe.members` to `out`, in the memory of one tensor.

    Weights are stored in the first member's number format; `config.precision` says what the model computes in. Members
    that all have one folder are copies of it (sparse upcycling). `seed`: of the routers. `watch(done, total)` sees
    every tensor. Raises UserError.
    """
    _check_free(out)
    sources = open_dense_members(config.moe)
    first = sources[0]
    config = replace(config, method="moe", model=first.config)
    config.moe.ffn_width(config.model.ffn_size)
    metas = {name: meta for name, _, meta in whole_model(config).own_parameters()}
    blobs, state = untrained_files(config, first.tokenizer)
    write_upcycled(out, config.moe, sources, metas, blobs, state, seed, watch)
    return config


def _check_free(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already; give another --out or remove it first")


def _open_bts(checkpoint: Path) -> StoredModel:
    stored = open_model(checkpoint)
    if stored.config.method != "bts":
        raise UserError(f"{stored.folder} holds a model of method {stored.config.method}; only a BTS model has experts")
    return stored


def _tokenizer(stored: StoredModel) -> str:
    """A checkpoint's own tokenizer, which training may have set, else its hub's."""
    return find_tokenizer(stored.folder) or stored.members[HUB].tokenizer


def _initial(config: RunConfig, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All stitch tensors of `config`: the known ones, and the others at their start."""
    mesh = ParallelMesh()
    dtype = next(iter(known.values())).dtype if known else resolve_dtype(config.precision.dtype, torch.device("cpu"))
    model = BTSModel(config.model, config.bts, make_backend(config, mesh, dtype, "meta"))
    return {
        name: known[name] if name in known else meta.initial(name, SEED).to(dtype)
        for name, _, meta in model.own_parameters()
    }


def untrained_files(config: RunConfig, tokenizer_folder: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(small files, state) of a checkpoint of `config` that no run has trained."""
    tokenizer = build_tokenizer(tokenizer_folder) if tokenizer_folder else None
    state = {"step": 0, "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else ""}
    return {CONFIG_FILE: to_yaml(config).encode(), **checkpoint_files(tokenizer)}, state


def _write(
    out: Path, config: RunConfig, tensors: Mapping[str, Tensor], members: list[MemberRecord], tokenizer_folder: str
) -> RunConfig:
    """A checkpoint folder of `config` at `out`."""
    blobs, state = untrained_files(config, tokenizer_folder)
    write_checkpoint(out, {MODEL_FILE: tensors}, blobs, state, members)
    return config
