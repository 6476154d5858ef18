"""From a configuration or a checkpoint to a model: the one table of methods."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from megabts.bts.build import load_member, member_records, open_members, with_members
from megabts.bts.model import BTSModel
from megabts.checkpoint.folder import load_tensors
from megabts.checkpoint.hf import config_from_hf, dtype_from_hf, is_hf_folder, weights_from_hf
from megabts.checkpoint.manifest import MODEL_FILE, MemberRecord, check_member, read_manifest
from megabts.checkpoint.source import CONFIG_FILE, open_dense
from megabts.checkpoint.storage import resolve
from megabts.config.load import from_yaml
from megabts.config.model import ModelConfig
from megabts.config.run import PrecisionConfig, RunConfig
from megabts.errors import UserError
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, load_full
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


@dataclass
class LoadedModel:
    """A model with its weights, and where they came from."""

    model: Built
    config: RunConfig
    folder: Path
    members: list[MemberRecord]
    tokenizer: str
    """The tokenizer's folder; "" when the checkpoint has none."""


def new_model(config: RunConfig, mesh: ParallelMesh, backend: Backend) -> tuple[Built, list[MemberRecord]]:
    """A model at the start of training: dense from its seed, BTS from its members' weights."""
    model = BUILDERS[config.method](config, mesh, backend)
    if not isinstance(model, BTSModel):
        initialise(model.own_parameters(), config.train.seed, mesh)
        return model, []
    sources = open_members(config.bts)
    for name, source in sources.items():
        load_member(model, name, source.weights(), mesh, str(source.folder))
    initialise(model.own_parameters(), config.train.seed, mesh)
    return model, member_records(sources)


def load_model(
    path: str | Path,
    mesh: ParallelMesh,
    dtype: torch.dtype | None,
    device: torch.device | str,
    *,
    run: RunConfig | None = None,
) -> LoadedModel:
    """The model of a run or checkpoint folder, or of a Hugging Face folder; nothing else is needed.

    `dtype` None: as the checkpoint's run computed, or the Hugging Face folder is stored. `run`: build it with this
    run's settings instead of its own ones.
    Raises UserError (not there, damaged, a member moved or changed).
    """
    config, folder, members = describe(path)
    config = run or config
    backend = make_backend(config, mesh, dtype or torch_dtype(config), device)
    model = BUILDERS[config.method](config, mesh, backend)
    for member in members:
        assert isinstance(model, BTSModel)
        load_member(model, member.name, open_dense(member.path).weights(), mesh, member.path)
    weights = (
        weights_from_hf(folder) if is_hf_folder(folder) else load_tensors(folder, MODEL_FILE, verify=False).items()
    )
    load_full(model.own_parameters(), weights, mesh, str(folder))
    return LoadedModel(model, config, folder, members, find_tokenizer(folder))


def describe(path: str | Path) -> tuple[RunConfig, Path, list[MemberRecord]]:
    """(configuration, checkpoint folder, members) of a model on disk, without its weights; members are checked."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a checkpoint, a run folder or a Hugging Face folder")
    if is_hf_folder(folder):
        stored: Literal["bfloat16", "float32"] = "bfloat16" if dtype_from_hf(folder) == "bfloat16" else "float32"
        model = ModelConfig(**config_from_hf(folder))
        return RunConfig(model=model, precision=PrecisionConfig(dtype=stored)), folder, []
    folder = resolve(folder)
    config = from_yaml((folder / CONFIG_FILE).read_text(), str(folder / CONFIG_FILE))
    members = list(read_manifest(folder).members)
    if config.method == "bts":
        folders = {member.name: check_member(member, folder) for member in members}
        config = replace(config, bts=with_members(config.bts, folders))
    return config, folder, members


def torch_dtype(config: RunConfig) -> torch.dtype:
    """The dtype a checkpoint's run computed in; `auto` is float32 wherever the hardware is not asked."""
    return torch.bfloat16 if config.precision.dtype == "bfloat16" else torch.float32


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters held by this rank."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
