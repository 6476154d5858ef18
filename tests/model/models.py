"""What the model tests share: decoders with random weights, and how close tensors are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megabts.config.model import ModelConfig
from megabts.model.backend import Recompute
from megabts.model.decoder import Decoder, sequence_loss
from megabts.model.part import Part
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "init_std": 0.2,
}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 16}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.2,
    "truncate": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "wide-heads": {"head_dim": 24},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "bias": {"qkv_bias": True, "tie_embeddings": True},
    "qk-norm": {"qk_norm": True, "head_dim": 16},
    "post-norm": {"norm_position": "post", "qk_norm": True, "qk_norm_span": "full"},
    "yarn": {"rope_scaling": YARN, "rope_theta": 500.0},
}


def decoder(
    mesh: ParallelMesh | None = None,
    *,
    sequence: bool = False,
    part: Part | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    library: Callable[..., TorchBackend] = TorchBackend,
    device: str = "cpu",
    **sizes: Any,
) -> Decoder:
    """A decoder of SIZES changed by `sizes`, whose every parameter, norms and biases too, is random by its name."""
    mesh = mesh or ParallelMesh()
    backend = library(dtype, device, mesh.tp, sequence)
    model = Decoder(ModelConfig(**{**SIZES, **sizes}), backend, part=part, recompute=recompute)
    initialise(model.own_parameters(), 1, mesh)
    with torch.no_grad():
        for name, parameter, meta in model.own_parameters():
            if meta.init == "constant":
                full = torch.randn(meta.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
                parameter.add_(meta.shard(full, mesh.axis(meta.axis)).to(device))
    return model


def batch(vocab_size: int = 97, size: int = 2, length: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, labels, mask) of random text with some positions masked."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(vocab_size, (size, length + 1), generator=generator)
    mask = (torch.rand(size, length, generator=generator) < 0.8).float()
    return text[:, :-1], text[:, 1:], mask


def gradients(model: Decoder, *args: Tensor, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """`sequence_loss` of these arguments and the gradient of every parameter."""
    model.zero_grad()
    loss = sequence_loss(model, *args, **keywords)
    loss.backward()
    found = {name: parameter.grad for name, parameter, _ in model.own_parameters()}
    return loss.detach(), {name: grad.clone() for name, grad in found.items() if grad is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
