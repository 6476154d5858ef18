"""The models that the CPU suite measures, ours and transformers' of the same shape; all values are random.

Shapes are S, of which a token's arithmetic is small beside its operators' calls, and M, about six times as large.
"""

from typing import Any, TypeVar

import torch

from megabts.bts.model import BTSModel
from megabts.checkpoint.hf_config import config_to_hf
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas

SHAPES = {
    "S": ModelConfig(vocab_size=8192, hidden_size=256, num_layers=8, num_heads=8, num_kv_heads=4, ffn_size=704),
    "M": ModelConfig(vocab_size=8192, hidden_size=512, num_layers=12, num_heads=8, num_kv_heads=4, ffn_size=1408),
}
"""By name; head width 32 and 64, 10.3M and 41M parameters."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By the name in the results."""
NUM_EXPERTS = 3
"""Beside the hub, all of its shape."""
STITCH_EVERY = 2
"""Layers."""
BATCH, LENGTH = 8, 256
"""Of a training step: sequences, and tokens of each."""
Made = TypeVar("Made", Decoder, BTSModel)


def stitching(model: ModelConfig, num_experts: int = NUM_EXPERTS, num_stitch_layers: int = 0) -> BTSConfig:
    """A hub and experts, with so many stitch layers or one after every STITCH_EVERY layers, kinds alternating."""
    experts = {f"expert{number}": "none" for number in range(1, num_experts + 1)}
    return BTSConfig("none", experts, num_stitch_layers=num_stitch_layers or model.num_layers // STITCH_EVERY)


def make_dense(shape: str, backend: Backend) -> Decoder:
    """A decoder with random weights."""
    return _random(Decoder(SHAPES[shape], backend))


def make_bts(shape: str, backend: Backend, num_experts: int = NUM_EXPERTS, num_stitch_layers: int = 0) -> BTSModel:
    """A stitched model, as `stitching` says, whose members have different random weights, the stitches their start."""
    config = SHAPES[shape]
    return _random(BTSModel(config, stitching(config, num_experts, num_stitch_layers), backend))


def make_llama(shape: str, dtype: torch.dtype) -> Any:
    """`make_dense`'s shape as transformers' LlamaForCausalLM, with its default attention (torch's fused one)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**config_to_hf(SHAPES[shape], str(dtype).removeprefix("torch."))))
    return model.to(dtype)


def _random(model: Made) -> Made:
    initialise(named_metas(model), 0, ParallelMesh())
    return model
