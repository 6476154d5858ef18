"""Decoder against transformers' Llama, Qwen2 (biases), Qwen3 (query and key norms) and OLMo-2 (norms on outputs, query
and key norms over all heads): logits, loss, every gradient."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megabts.config.model import ModelConfig
from megabts.model.attention import make_context
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import load_full
from tests.model.models import VARIANTS, batch, decoder, distance, gradients

TOLERANCE = 1e-5
FAMILIES: dict[str, tuple[type, type]] = {
    "bias": (Qwen2Config, Qwen2ForCausalLM),
    "qk-norm": (Qwen3Config, Qwen3ForCausalLM),
    "post-norm": (Olmo2Config, Olmo2ForCausalLM),
}
POST_NAMES = {
    "attention_norm.weight": ["post_attention_layernorm.weight"],
    "mlp_norm.weight": ["post_feedforward_layernorm.weight"],
}
LAYER_NAMES = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attention.qkv.bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "mlp_norm.weight": ["post_attention_layernorm.weight"],
    "mlp.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
}
OTHER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    scaling = dict(config.rope_scaling)
    original = scaling.pop("original_max_position", None)
    parameters = {"rope_type": scaling.pop("type", "default"), "rope_theta": config.rope_theta, **scaling}
    return parameters | ({"original_max_position_embeddings": original} if original else {})


def hf_config(config: ModelConfig, kind: type = LlamaConfig) -> Any:
    return kind(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_size,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope_parameters(config),
        max_position_embeddings=256,
        attn_implementation="eager",
    )


def as_ours(theirs: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Transformers' tensors under megabts' names, fused."""
    ours = {}
    post = "model.layers.0.post_feedforward_layernorm.weight" in theirs
    parts = LAYER_NAMES | (POST_NAMES if post else {})
    for name in names:
        if name in OTHER_NAMES:
            ours[name] = theirs[OTHER_NAMES[name]]
        else:
            layer, rest = name.removeprefix("layers.").split(".", 1)
            ours[name] = torch.cat([theirs[f"model.layers.{layer}.{part}"] for part in parts[rest]])
    return ours


def pair(variant: str) -> tuple[Decoder, nn.Module]:
    """The same random weights in both."""
    ours = decoder(**VARIANTS[variant])
    config_class, model_class = FAMILIES.get(variant, (LlamaConfig, LlamaForCausalLM))
    torch.manual_seed(0)
    theirs: nn.Module = model_class(hf_config(ours.config, config_class)).float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.dim() == 1))
    names = [name for name, _, _ in ours.own_parameters()]
    tensors = as_ours(theirs.state_dict(), names)
    load_full(ours.own_parameters(), tensors.items(), ParallelMesh(), "transformers")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    return ours, theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_transformers(variant: str) -> None:
    ours, theirs = pair(variant)
    tokens, labels, mask = batch()
    expected = theirs(tokens).logits
    context = make_context(ours.config, torch.arange(tokens.shape[1]), torch.float32)
    with torch.no_grad():
        logits = ours.logits(ours.run_layers(0, ours.config.num_layers, ours.embed(tokens), context))
    assert distance(logits, expected) < TOLERANCE

    loss, grads = gradients(ours, tokens, labels, mask)
    expected_loss = (F.cross_entropy(expected.transpose(1, 2), labels, reduction="none") * mask).sum()
    expected_loss.backward()
    assert abs(loss.item() / expected_loss.item() - 1) < TOLERANCE
    their_grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, expected_grad in as_ours(their_grads, list(grads)).items():
        assert distance(grads[name], expected_grad) < TOLERANCE, name
    assert len(grads) == len(list(ours.own_parameters()))


def test_a_wrong_model_is_far_away() -> None:
    """The comparison sees a wrong rope base and swapped gate and up."""
    ours, theirs = pair("gqa")
    tokens = batch()[0]
    expected = theirs(tokens).logits
    for change in ("rope", "swiglu"):
        if change == "rope":
            ours.config.rope_theta = 500.0
        else:
            ours.config.rope_theta = 10_000.0
            gate_up = ours.get_parameter("layers.0.mlp.gate_up.weight")
            gate_up.data = gate_up.data.roll(gate_up.shape[0] // 2, 0)
        context = make_context(ours.config, torch.arange(tokens.shape[1]), torch.float32)
        with torch.no_grad():
            logits = ours.logits(ours.run_layers(0, ours.config.num_layers, ours.embed(tokens), context))
        assert distance(logits, expected) > 1e-2, change


def test_without_head_there_are_no_head_parameters() -> None:
    whole = decoder()
    mesh = ParallelMesh()
    body = Decoder(whole.config, TorchBackend(torch.float32, "cpu", mesh.tp), with_head=False)
    missing = {n for n, _ in whole.named_parameters()} - {n for n, _ in body.named_parameters()}
    assert missing == {"final_norm.weight", "head.weight"}
