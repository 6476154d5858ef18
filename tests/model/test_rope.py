"""Rotary positions against transformers' frequencies (bitwise) and against complex numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megabts.checkpoint.hf_rope import rope_from_hf
from megabts.config.model import ModelConfig
from megabts.model.rope import inverse_frequencies, rotate, rotation
from tests.model.test_decoder_hf import hf_config

LLAMA31 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position": 8192,
}


@pytest.mark.parametrize("head_dim", [64, 128, 24])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", [{}, {"type": "linear", "factor": 3.0}, LLAMA31, {**LLAMA31, "factor": 32.0}])
def test_inverse_frequencies_are_transformers_bit_for_bit(scaling: dict[str, Any], theta: float, head_dim: int) -> None:
    config = ModelConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    # Its buffer is made by ROPE_INIT_FUNCTIONS, or by its own default.
    assert torch.equal(inverse_frequencies(config), LlamaRotaryEmbedding(hf_config(config)).inv_freq)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"attention_factor": 1.5},
        {"mscale": 0.707, "mscale_all_dim": 1.2},
        {"factor": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e6), (64, 10_000.0), (8, 500.0)])
def test_yarn_is_transformers_bit_for_bit(options: dict[str, Any], head_dim: int, theta: float) -> None:
    """What a config.json leaves out, too: it is read as the importer reads it."""
    raw = {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": 4096, **options}
    base, scaling = rope_from_hf({"rope_parameters": raw}, Path("config.json"))
    config = ModelConfig(head_dim=head_dim, rope_theta=base, rope_scaling=scaling)
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=head_dim, max_position_embeddings=16_384, rope_parameters=dict(raw))
    )
    assert torch.equal(inverse_frequencies(config), theirs.inv_freq)
    positions = torch.arange(0, 16_384, 97)
    cos, sin = rotation(config, positions, torch.float32)
    expected = theirs(torch.zeros(1), positions[None])
    assert torch.equal(cos[:, 0, 0], expected[0][0, :, : head_dim // 2])
    assert torch.equal(sin[:, 0, 0], expected[1][0, :, : head_dim // 2])


def test_rotation_is_a_complex_product() -> None:
    config = ModelConfig(head_dim=8)
    positions = torch.tensor([[3, 0], [5, 7], [1000, 11]])  # differ over the batch
    x = torch.randn(3, 2, 4, 8)
    angles = positions[..., None, None] * inverse_frequencies(config)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, rotation(config, positions, torch.float32)), expected)


def test_positions_of_one_sequence_serve_every_row() -> None:
    config = ModelConfig(head_dim=8)
    one = rotation(config, torch.arange(5), torch.float32)
    rows = rotation(config, torch.arange(5).unsqueeze(1).expand(5, 3), torch.float32)
    x = torch.randn(5, 3, 2, 8)
    assert torch.equal(rotate(x, one), rotate(x, rows))


def test_gradient_is_the_rotation_back() -> None:
    config = ModelConfig(head_dim=6)
    rope = rotation(config, torch.arange(4), torch.float64)
    x = torch.randn(4, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rope), x)


def test_bfloat16_is_close() -> None:
    config = ModelConfig(head_dim=16)
    positions = torch.arange(40)
    x = torch.randn(40, 1, 2, 16)
    low = rotate(x.bfloat16(), rotation(config, positions, torch.bfloat16)).float()
    torch.testing.assert_close(low, rotate(x, rotation(config, positions, torch.float32)), atol=0.05, rtol=0.02)
