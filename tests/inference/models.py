"""Small random models, with weights large enough that logits differ and attention matters."""

from typing import Any

import torch

from megabts.bts.model import BTSModel
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 5,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "max_seq_len": 48,
    "init_std": 0.3,
}
LLAMA3 = {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 16}
DENSE: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"num_kv_heads": 1},
    "mha": {"num_kv_heads": 4, "tie_embeddings": True},
    "bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True, "head_dim": 16},
    "post_norm": {"norm_position": "post", "qk_norm": True, "qk_norm_span": "full"},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
}
BTS: dict[str, dict[str, Any]] = {
    "alternating": {"num_stitch_layers": 2},  # 2 does not divide 5 layers
    "unchanged": {"num_stitch_layers": 4, "alternating": False, "expert_stream": "unchanged"},
    "one": {"num_stitch_layers": 1},
    "placed": {"num_stitch_layers": 3, "placement": [1, 4, 5]},
    "preserving": {"num_stitch_layers": 5, "start": "hub_preserving"},
    "mixture": {"num_stitch_layers": 2, "output": "mixture", "gate": "token"},
    "evidence": {"num_stitch_layers": 2, "output": "mixture", "evidence": 3},
}
MODELS = [f"dense-{name}" for name in DENSE] + [f"bts-{name}" for name in BTS]


def dense(**sizes: Any) -> Decoder:
    """A decoder whose every parameter, biases and norms too, is random."""
    mesh = ParallelMesh()
    config = ModelConfig(**{**SIZES, **sizes})
    model = Decoder(config, TorchBackend(torch.float32, "cpu", mesh.tp))
    initialise(named_metas(model), 1, mesh)
    return shake(model)


def stitched(sizes: dict[str, Any] | None = None, **settings: Any) -> BTSModel:
    """A hub and two experts at different random weights, with random stitches."""
    mesh = ParallelMesh()
    bts = BTSConfig("hub", {"code": "code", "math": "math"}, gate_dropout=0.5, **settings)
    model = BTSModel(ModelConfig(**{**SIZES, **(sizes or {})}), bts, TorchBackend(torch.float32, "cpu", mesh.tp))
    initialise(named_metas(model), 2, mesh)
    return shake(model)


def build(name: str) -> Decoder | BTSModel:
    """A model of MODELS."""
    kind, _, variant = name.partition("-")
    return dense(**DENSE[variant]) if kind == "dense" else stitched(**BTS[variant])


def shake(model: Any) -> Any:
    """All parameters moved a little at random, biases and norms too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model
