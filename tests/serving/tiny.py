"""Small random models of bytes on disk, whose greedy completions go on for as long as they are let."""

from pathlib import Path
from typing import Any

import torch

from megabts.bts.model import BTSModel
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import MODEL_FILE, MemberRecord, content_hash
from megabts.checkpoint.source import CONFIG_FILE
from megabts.config.load import to_yaml
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.protocol import checkpoint_files

SIZES = ModelConfig(
    vocab_size=257,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=128,
    max_seq_len=256,
    init_std=0.15,
)
EXPERTS = ("code", "math")


def write_dense(folder: Path, seed: int, sizes: ModelConfig = SIZES) -> Path:
    """A dense checkpoint."""
    mesh = ParallelMesh()
    model = Decoder(sizes, TorchBackend(torch.float32, "cpu", mesh.tp))
    initialise(named_metas(model), seed, mesh)
    tensors = {name: parameter.detach() for name, parameter, _ in model.own_parameters()}
    return _write(folder, RunConfig(model=sizes), tensors, [])


def write_stitched(folder: Path, damage: float = 0.0, sizes: ModelConfig = SIZES, **settings: Any) -> Path:
    """A BTS checkpoint with its members beside it, in a form of these `bts` settings.

    `damage` is added to every number of the stitches.
    """
    members = {
        name: write_dense(folder.parent / "members" / name, seed, sizes) for seed, name in enumerate(("hub", *EXPERTS))
    }
    experts = {name: str(members[name]) for name in EXPERTS}
    bts = BTSConfig(str(members["hub"]), experts, num_stitch_layers=2, **settings)
    mesh = ParallelMesh()
    model = BTSModel(sizes, bts, TorchBackend(torch.float32, "cpu", mesh.tp))
    initialise(model.own_parameters(), 0, mesh)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: parameter.detach() + torch.randn(parameter.shape, generator=generator) / 4 + damage
        for name, parameter, _ in model.own_parameters()
    }
    records = [MemberRecord(name, str(path), content_hash(path)) for name, path in members.items()]
    return _write(folder, RunConfig(method="bts", model=sizes, bts=bts), tensors, records)


def _write(folder: Path, config: RunConfig, tensors: dict[str, torch.Tensor], members: list[MemberRecord]) -> Path:
    blobs = {CONFIG_FILE: to_yaml(config).encode(), **checkpoint_files(build_tokenizer("bytes"))}
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, {MODEL_FILE: tensors}, blobs, {}, members)
    return folder
