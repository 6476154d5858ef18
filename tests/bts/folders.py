"""Dense checkpoints of random weights, as members of stitched models."""

from pathlib import Path
from typing import Any

import torch
import yaml

from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.source import CONFIG_FILE
from megabts.config.model import ModelConfig
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas
from tests.bts.reference import SIZES

TOKENS = torch.tensor([[3, 7, 1, 30, 12, 4], [0, 29, 5, 5, 18, 2]])


def write_dense(
    folder: Path,
    seed: int,
    *,
    fingerprint: str = "",
    dtype: torch.dtype = torch.float32,
    precision: dict[str, str] | None = None,
    **sizes: Any,
) -> Path:
    """A megabts checkpoint of a random decoder; `precision`: the section of its run's configuration."""
    mesh, config = ParallelMesh(), ModelConfig(**{**SIZES, **sizes})
    model = Decoder(config, TorchBackend(dtype, "cpu", mesh.tp))
    initialise(named_metas(model), seed, mesh)
    tensors = {name: parameter.detach() for name, parameter, _ in model.own_parameters()}
    state = {"step": 0, "tokenizer_fingerprint": fingerprint}
    text = yaml.safe_dump({"model": {**SIZES, **sizes}, "precision": precision or {}})
    write_checkpoint(folder, {MODEL_FILE: tensors}, {CONFIG_FILE: text.encode()}, state)
    return folder


def write_members(root: Path, *names: str, **settings: Any) -> dict[str, str]:
    """One dense checkpoint per name below `root`, each with other weights: {name: folder}."""
    return {name: str(write_dense(root / name, seed, **settings)) for seed, name in enumerate(names, 1)}
