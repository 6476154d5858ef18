"""From a configuration or a checkpoint to a model: the one table of methods."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from megabts.bts.build import load_member, member_records, open_members, remove_expert, with_members
from megabts.bts.model import BTSModel
from megabts.checkpoint.folder import load_tensors
from megabts.checkpoint.hf import weights_from_hf
from megabts.checkpoint.hf_config import config_from_hf, dtype_from_hf, is_hf_folder
from megabts.checkpoint.manifest import MODEL_FILE, MemberRecord, read_manifest
from megabts.checkpoint.source import CONFIG_FILE, DenseSource, open_member
from megabts.checkpoint.storage import resolve
from megabts.config.load import from_yaml
from megabts.config.run import PrecisionConfig, RunConfig
from megabts.errors import UsageError, UserError
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, load_full
from megabts.runtime.device import resolve_dtype
from megabts.tokenizers.build import find_tokenizer

Built = Decoder | BTSModel


def make_backend(config: RunConfig, mesh: ParallelMesh, dtype: torch.dtype, device: torch.device | str) -> Backend:
    """The layer library that the configuration names."""
    return TorchBackend(dtype, device, mesh.tp)


def _dense(config: RunConfig, mesh: ParallelMesh, backend: Backend) -> Decoder:
    return Decoder(config.model, backend, recompute=config.train.recompute)


def _bts(config: RunConfig, mesh: ParallelMesh, backend: Backend) -> BTSModel:
    return BTSModel(config.model, config.bts, backend, recompute=config.train.recompute)


BUILDERS: dict[str, Callable[[RunConfig, ParallelMesh, Backend], Built]] = {"dense": _dense, "bts": _bts}
"""Method name -> builder of the model, its weights not yet set."""


@dataclass(frozen=True)
class StoredModel:
    """A model on disk, opened and verified; its weights are not read yet."""

    config: RunConfig
    folder: Path
    """The checkpoint folder itself, or a Hugging Face folder."""
    members: dict[str, DenseSource]
    """A BTS model's hub and experts."""


@dataclass
class LoadedModel:
    """A model with its weights, and where they came from."""

    model: Built
    config: RunConfig
    folder: Path
    members: list[MemberRecord]
    tokenizer: str
    """The tokenizer's folder; "" when the checkpoint has none."""


def new_model(
    config: RunConfig, mesh: ParallelMesh, backend: Backend, members: Mapping[str, DenseSource] | None = None
) -> tuple[Built, list[MemberRecord]]:
    """A model at the start of training: dense from its seed, BTS from its members' weights.

    `members`: those that are open already. Raises UserError, as `open_members` does.
    """
    model = BUILDERS[config.method](config, mesh, backend)
    sources = open_members(config.bts, members) if isinstance(model, BTSModel) else {}
    _load_members(model, sources, mesh)
    initialise(model.own_parameters(), config.train.seed, mesh)
    return model, member_records(sources)


def load_model(
    source: str | Path | StoredModel,
    mesh: ParallelMesh,
    dtype: torch.dtype | None,
    device: torch.device | str,
    *,
    run: RunConfig | None = None,
    without: Sequence[str] = (),
) -> LoadedModel:
    """The model of a run or checkpoint folder, or of a Hugging Face folder; nothing else is needed.

    `dtype` None: as the checkpoint's run computed, or the Hugging Face folder is stored. `run`: build it with this
    run's settings instead of its own ones. `without`: experts of a BTS model to leave out.
    Raises UserError (not there, damaged, a member moved or changed).
    """
    stored = source if isinstance(source, StoredModel) else open_model(source)
    config, folder = run or stored.config, stored.folder
    if without and config.method != "bts":
        raise UsageError(f"{folder} is a {config.method} model and has no experts; leave out --without {without[0]}")
    weights: Iterable[tuple[str, Tensor]]
    weights = weights_from_hf(folder) if is_hf_folder(folder) else load_tensors(folder, MODEL_FILE).items()
    for name in without:
        bts, kept = remove_expert(config.bts, dict(weights), name)
        config, weights = replace(config, bts=bts), kept.items()
    dtype = dtype or resolve_dtype(config.precision.dtype, torch.device(device))
    model = BUILDERS[config.method](config, mesh, make_backend(config, mesh, dtype, device))
    members = {name: member for name, member in stored.members.items() if name not in without}
    _load_members(model, members, mesh)
    load_full(model.own_parameters(), weights, mesh, str(folder))
    return LoadedModel(model, config, folder, member_records(members), find_tokenizer(folder))


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
    if config.method == "bts":
        config = replace(
            config, bts=with_members(config.bts, {name: member.folder for name, member in members.items()})
        )
    return StoredModel(config, folder, members)


def _load_members(model: Built, members: Mapping[str, DenseSource], mesh: ParallelMesh) -> None:
    for name, member in members.items():
        assert isinstance(model, BTSModel)
        load_member(model, name, member.weights(), mesh, str(member.folder))


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters held by this rank."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
