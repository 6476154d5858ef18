"""From a configuration or a checkpoint to a model: the one table of methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from megabts.bts.build import load_member, member_records, open_members, remove_expert, with_members
from megabts.bts.costs import bts_costs
from megabts.bts.model import BTSModel
from megabts.checkpoint.hf_config import config_from_hf, dtype_from_hf, is_hf_folder
from megabts.checkpoint.manifest import MemberRecord, read_manifest
from megabts.checkpoint.source import CONFIG_FILE, DenseSource, load_weights, open_member
from megabts.checkpoint.storage import resolve
from megabts.config.load import from_yaml
from megabts.config.run import ParallelConfig, PrecisionConfig, RunConfig
from megabts.errors import UsageError, UserError
from megabts.merge.ensemble import Ensemble
from megabts.merge.members import SideBySide, open_folders
from megabts.merge.routing import Routing
from megabts.model.backend import Backend
from megabts.model.costs import dense_costs
from megabts.model.decoder import Decoder
from megabts.model.part import Part
from megabts.model.te_backend import TEBackend
from megabts.model.te_fp8 import amax_group
from megabts.model.torch_backend import TorchBackend
from megabts.moe.flops import moe_costs
from megabts.moe.model import MoEModel
from megabts.parallel.balance import Costs, check_cuts, fastest_cuts
from megabts.parallel.layout import num_microbatches
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise
from megabts.runtime.device import DTYPES, check_fp8, check_te, have_te, resolve_dtype
from megabts.runtime.fusion import Fuse, eager
from megabts.tokenizers.build import find_tokenizer

Built = Decoder | BTSModel | Ensemble | Routing


def make_backend(
    config: RunConfig,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    device: torch.device | str,
    fuse: Fuse = eager,
) -> Backend:
    """The layer library that the configuration names; without values (device meta) they are all alike.

    Raises UserError where the library is missing or does not run. Every rank must call it.
    """
    precision, sequence = config.precision, config.parallel.sequence
    frozen = None if precision.frozen == "same" else DTYPES[precision.frozen]
    if precision.layers == "torch" or torch.device(device).type == "meta":
        fp8 = "none" if torch.device(device).type == "meta" else precision.fp8
        if fp8 != "none":
            check_fp8(torch.device(device))
        return TorchBackend(dtype, device, mesh.tp, sequence, fuse, fp8, frozen)
    check_te(torch.device(device))
    group = amax_group(mesh, config.parallel.timeout) if precision.fp8 == "delayed" else None
    return TEBackend(dtype, device, mesh.tp, sequence, precision.fp8, group, fuse, frozen)


def model_costs(config: RunConfig) -> Costs:
    """Operations per token of the model's parts, on the busiest expert-parallel rank."""
    full = config.train.recompute == "full"
    if config.method == "bts":
        ranks, exchange = config.parallel.expert, config.parallel.exchange
        return bts_costs(
            config.model, config.bts, config.data.seq_length, recompute=full, num_expert_ranks=ranks, exchange=exchange
        )
    if config.method == "moe":
        return moe_costs(config.model, config.moe, config.data.seq_length, recompute=full)
    return dense_costs(config.model, config.data.seq_length, recompute=full)


def stage_cuts(config: RunConfig, dp: int) -> list[int]:
    """Layers before each boundary between virtual stages: the configuration's, or the fastest by cost.

    Raises UsageError for cuts that do not fit the model.
    """
    parallel = config.parallel
    if parallel.cuts:
        return check_cuts(parallel.cuts, config.model.num_layers, parallel.num_stages)
    return fastest_cuts(
        model_costs(config),
        parallel.pipeline,
        num_microbatches(config, dp),
        schedule=parallel.schedule,
        chunks=parallel.chunks,
    )


def _part(config: RunConfig, mesh: ParallelMesh) -> Part:
    """What of the model this rank's place on the pipeline axis holds."""
    if mesh.pp.size == 1:
        return Part.whole(config.model.num_layers)
    cuts = stage_cuts(config, mesh.dp.size)
    return Part.of_rank(mesh.pp.rank, mesh.pp.size, config.model.num_layers, cuts, config.parallel.chunks)


def _dense(config: RunConfig, mesh: ParallelMesh, backend: Backend) -> Decoder:
    return Decoder(config.model, backend, part=_part(config, mesh), recompute=config.train.recompute)


def _bts(config: RunConfig, mesh: ParallelMesh, backend: Backend) -> BTSModel:
    return BTSModel(
        config.model,
        config.bts,
        backend,
        ep=mesh.ep,
        part=_part(config, mesh),
        exchange=config.parallel.exchange,
        recompute=config.train.recompute,
    )


def _moe(config: RunConfig, mesh: ParallelMesh, backend: Backend) -> MoEModel:
    return MoEModel(
        config.model,
        config.moe,
        backend,
        part=_part(config, mesh),
        recompute=config.train.recompute,
        experts=mesh.experts,
    )


BUILDERS: dict[str, Callable[[RunConfig, ParallelMesh, Backend], Built]] = {
    "dense": _dense,
    "bts": _bts,
    "moe": _moe,
    "btm": lambda config, _, backend: Ensemble(config.model, config.btm, backend),
    "routing": lambda config, _, backend: Routing(config.model, config.routing, backend),
}
"""Method name -> builder of the model, its weights not yet set."""


@dataclass(frozen=True)
class StoredModel:
    """A model on disk, opened and verified; its weights are not read yet."""

    config: RunConfig
    folder: Path
    """The checkpoint folder itself, or a Hugging Face folder."""
    members: dict[str, DenseSource]
    """Of a BTS model hub and experts; of an ensemble or routing its members."""


@dataclass
class LoadedModel:
    """A model with its weights, and where they came from."""

    model: Built
    config: RunConfig
    folder: Path
    members: list[MemberRecord]
    tokenizer: str
    """The tokenizer's folder; "" when the checkpoint has none."""

    def tokenizer_or(self, given: str | None) -> str:
        """Of the tokenizer to use, what `build_tokenizer` takes: `given`, else the checkpoint's own.

        Raises UserError when there is neither.
        """
        if not (given or self.tokenizer):
            raise UserError(f"{self.folder} has no tokenizer; give --tokenizer (to the harness: tokenizer=SPEC)")
        return given or self.tokenizer


def new_model(
    config: RunConfig, mesh: ParallelMesh, backend: Backend, members: Mapping[str, DenseSource] | None = None
) -> tuple[Built, list[MemberRecord]]:
    """A model at the start of training: dense from its seed, one of members from their weights.

    `members`: those that are open already. Raises UserError, as `method_members` does.
    """
    model = BUILDERS[config.method](config, mesh, backend)
    sources = method_members(config, members)
    _load_members(model, sources, mesh)
    initialise(model.own_parameters(), config.train.seed, mesh)
    return model, member_records(sources)


def method_members(config: RunConfig, opened: Mapping[str, DenseSource] | None = None) -> dict[str, DenseSource]:
    """The folders of the members that the method's models leave where they are; those in `opened` are not read again.

    Raises UserError when one is missing, UsageError when they do not fit together or are too few.
    """
    if config.method == "bts":
        return open_members(config.bts, opened)
    folders = {"btm": config.btm.members, "routing": config.routing.members}.get(config.method)
    return {} if folders is None else open_folders(config.method, folders, opened)


def load_model(
    source: str | Path | StoredModel,
    mesh: ParallelMesh,
    dtype: torch.dtype | None,
    device: torch.device | str,
    *,
    run: RunConfig | None = None,
    without: Sequence[str] = (),
    fuse: Fuse = eager,
) -> LoadedModel:
    """The model of a run or checkpoint folder, or of a Hugging Face folder; nothing else is needed.

    `dtype` None: as the checkpoint's run computed, or the Hugging Face folder is stored; else of all of it. `run`:
    build it with this run's settings instead of its own ones, whose layer library gives way to torch where it does not
    run; torch's layers are then without FP8, which is for training.
    `without`: experts of a BTS model to leave out. `fuse`: see `megabts.runtime.fusion`.
    Raises UserError (not there, damaged, a member moved or changed).
    """
    stored = source if isinstance(source, StoredModel) else open_model(source)
    config, folder = run or _on(device, stored.config, dtype), stored.folder
    if without and config.method != "bts":
        raise UsageError(f"{folder} is a {config.method} model and has no experts; leave out --without {without[0]}")
    whole = full_shapes(whole_model(config))
    for name in without:
        config = replace(config, bts=remove_expert(config.bts, {}, name)[0])
    dtype = dtype or resolve_dtype(config.precision.dtype, torch.device(device))
    model = BUILDERS[config.method](config, mesh, make_backend(config, mesh, dtype, device, fuse))
    members = {name: member for name, member in stored.members.items() if name not in without}
    _load_members(model, members, mesh)
    load_weights(folder, model.own_parameters(), whole, mesh)
    return LoadedModel(model, config, folder, member_records(members), find_tokenizer(folder))


def _on(device: torch.device | str, config: RunConfig, dtype: torch.dtype | None) -> RunConfig:
    if dtype is not None:
        config = replace(config, precision=replace(config.precision, frozen="same"))
    if config.precision.layers == "te" and torch.device(device).type == "cuda" and have_te():
        return config
    return replace(config, precision=replace(config.precision, layers="torch", fp8="none"))


def open_model(path: str | Path) -> StoredModel:
    """The model of a run, checkpoint or Hugging Face folder, its members opened too. Reads all bytes of checkpoints.

    Raises UserError (not there, damaged, a member moved or changed).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a checkpoint, a run folder or a Hugging Face folder")
    if is_hf_folder(folder):
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if dtype_from_hf(folder) == "bfloat16" else "float32"
        model = config_from_hf(folder)
        return StoredModel(RunConfig(model=model, precision=PrecisionConfig(dtype=dtype)), folder, {})
    folder = resolve(folder)
    config = from_yaml((folder / CONFIG_FILE).read_text(), str(folder / CONFIG_FILE))
    members = {record.name: open_member(record, folder) for record in read_manifest(folder).members}
    places = {name: member.folder for name, member in members.items()}
    if config.method == "bts":
        config = replace(config, bts=with_members(config.bts, places))
    paths = {name: str(place) for name, place in places.items()}
    if config.method == "btm":
        config = replace(config, btm=replace(config.btm, members=paths))
    elif config.method == "routing":
        config = replace(config, routing=replace(config.routing, members=paths))
    return StoredModel(config, folder, members)


def whole_model(config: RunConfig) -> Built:
    """The model of all ranks together, without values: what names and shapes a checkpoint of it has."""
    alone = replace(config, parallel=ParallelConfig(), precision=PrecisionConfig())
    return BUILDERS[config.method](alone, ParallelMesh(), make_backend(alone, ParallelMesh(), torch.float32, "meta"))


def full_shapes(model: Built) -> dict[str, tuple[int, ...]]:
    """Full shapes, by name, of what checkpoints hold of a model."""
    return {name: meta.shape for name, _, meta in model.own_parameters()}


def _load_members(model: Built, members: Mapping[str, DenseSource], mesh: ParallelMesh) -> None:
    """The weights of the members that this rank runs."""
    if not isinstance(model, BTSModel | SideBySide):
        return
    whole = full_shapes(whole_model(RunConfig(model=model.config)))
    for name, member in members.items():
        if name in model.members:
            load_member(model, name, member.folder, whole, mesh)


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters held by this rank."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
