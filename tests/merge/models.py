"""Small random models of members that nothing stitches."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megabts.config.model import ModelConfig
from megabts.merge.members import SideBySide
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas
from tests.bts.reference import SIZES

MESH = ParallelMesh()
Model = TypeVar("Model", bound=SideBySide)
NAMES = ("seed", "code", "math")


def backend(dtype: torch.dtype = torch.float32) -> TorchBackend:
    return TorchBackend(dtype, "cpu", MESH.tp)


def config(**sizes: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, "max_seq_len": 48, **sizes})


def folders(names: Sequence[str] = NAMES) -> dict[str, str]:
    return dict.fromkeys(names, "unread")


def randomised(model: Model, *, alike: bool = False) -> Model:
    """Random members, different or all alike; whatever else there is stays at its start."""
    for seed, member in enumerate(model.decoders()):
        initialise(named_metas(member), 1 if alike else seed, MESH)
    initialise(model.own_parameters(), 0, MESH)
    return model


def dense_like(model: SideBySide) -> Decoder:
    """A dense model with the first member's weights."""
    dense = Decoder(model.config, backend(model.dtype))
    copy(dense, model.decoders()[0])
    return dense


@torch.no_grad()
def copy(into: nn.Module, source: nn.Module) -> None:
    for mine, theirs in zip(into.parameters(), source.parameters(), strict=True):
        mine.copy_(theirs)


def windows(rows: int, length: int, vocabulary: int = 31, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and labels [rows, length]."""
    ids = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]
