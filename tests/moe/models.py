"""Small MoE models, and dense ones whose feed-forward all their ffn experts are."""

from typing import Any

import torch

from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.model.decoder import Decoder
from megabts.model.part import Part
from megabts.model.torch_backend import TorchBackend
from megabts.moe.model import MoEModel
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 24,
    "init_std": 0.3,
}
MEMBERS = {"seed": "a", "code": "b", "math": "c"}


def moe_model(
    mesh: ParallelMesh | None = None,
    *,
    sequence: bool = False,
    part: Part | None = None,
    dtype: torch.dtype = torch.float64,
    recompute: Any = "none",
    sizes: dict[str, Any] = SIZES,
    **settings: Any,
) -> MoEModel:
    """A MoE model of `sizes` with random weights, the same numbers at every topology."""
    mesh = mesh or ParallelMesh()
    moe = MoEConfig(**{"members": MEMBERS, **settings})
    backend = TorchBackend(dtype, "cpu", mesh.tp, sequence)
    model = MoEModel(ModelConfig(**sizes), moe, backend, part=part, recompute=recompute)
    initialise(model.own_parameters(), 1, mesh)
    return model


def dense_model(dtype: torch.dtype = torch.float64, sizes: dict[str, Any] = SIZES) -> Decoder:
    """A dense decoder of the same sizes."""
    model = Decoder(ModelConfig(**sizes), TorchBackend(dtype, "cpu", ParallelMesh().tp))
    initialise(model.own_parameters(), 2, ParallelMesh())
    return model


def tokens(size: int = 2, length: int = 12) -> torch.Tensor:
    """Random token ids [b, s]."""
    return torch.randint(61, (size, length), generator=torch.Generator().manual_seed(5))
