"""Norms on outputs and norms of all heads at once: what they do not go with, and what they count."""

import pytest
import torch

from megabts.config.load import from_yaml
from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError
from megabts.model.torch_backend import RMSNorm, SplitRMSNorm, TorchBackend
from megabts.moe.model import MoEModel
from megabts.parallel.mesh import Axis, ParallelMesh
from megabts.parallel.sharding import ParamMeta
from tests.model.models import SIZES, VARIANTS, decoder


@pytest.mark.parametrize("variant", VARIANTS)
def test_number_of_parameters(variant: str) -> None:
    model = decoder(**VARIANTS[variant])
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters


def test_a_split_norm_of_one_rank_is_a_norm() -> None:
    torch.manual_seed(0)
    split = SplitRMSNorm(ParamMeta((12,), dim=0), 1e-6, Axis("tp"), torch.float64, torch.device("cpu"))
    plain = RMSNorm(12, 1e-6, torch.float64, torch.device("cpu"))
    weight, x = torch.randn(12).double(), torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    for norm in (split, plain):
        norm.weight.data = weight.clone()
    torch.testing.assert_close(split(x), plain(x))
    assert torch.autograd.gradcheck(split, x)
    for norm in (split, plain):
        norm(x.detach()).square().sum().backward()
    torch.testing.assert_close(split.weight.grad, plain.weight.grad)


def test_a_span_without_norms_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model\.qk_norm_span is full, but model\.qk_norm is false"):
        ModelConfig(qk_norm_span="full")


def test_configurations_of_before_mean_what_they_did() -> None:
    model = from_yaml("model: {qk_norm: true}").model
    assert (model.qk_norm, model.qk_norm_span, model.norm_position) == (True, "head", "pre")


def test_attention_experts_are_refused() -> None:
    config = ModelConfig(**{**SIZES, **VARIANTS["post-norm"]})
    members = {"a": "a", "b": "b"}
    backend = TorchBackend(torch.float32, "meta", ParallelMesh().tp)
    MoEModel(config, MoEConfig(members), backend)
    with pytest.raises(UsageError, match=r"model\.norm_position post does not go with attention experts"):
        MoEModel(config, MoEConfig(members, attention_experts=True, routing="soft"), backend)
