"""A decode step of all members at once against the layers one after another: states, caches, parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.bts.model import BTSModel
from megabts.config.methods import BTMConfig, MoEConfig
from megabts.config.model import ModelConfig
from megabts.inference import one_token
from megabts.inference.decoding import Admission, Decoding, Step
from megabts.inference.generate import generate
from megabts.inference.one_token import OneToken
from megabts.inference.settings import GenerationSettings
from megabts.merge.ensemble import Ensemble
from megabts.model.decoder import sequence_loss
from megabts.model.torch_backend import TorchBackend
from megabts.moe.model import MoEModel
from megabts.parallel.mesh import ParallelMesh
from tests.bts.reference import config_of, random_model
from tests.inference.models import MODELS, SIZES, build, dense, stitched

MEMBERS = {"seed": "seed", "code": "code", "math": "math"}
PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8]]
"""Of one length, so that no mask is needed."""


def steps(model: Any, prompts: list[list[int]], fast: bool) -> tuple[list[Tensor], Tensor]:
    """Logits of three decode steps, and the caches after them."""
    with torch.inference_mode():
        decoding = Decoding(model, 40)
        assert decoding._one_token is not None
        if not fast:
            decoding._one_token = None
        admitted = [Admission(20 * row, prompt) for row, prompt in enumerate(prompts)]
        decoding.run(Step(admitted=admitted))
        rows = range(len(prompts))
        logits = [decoding.run(Step(rows, [token + row for row in rows])) for token in (9, 10, 11)]
    return [part for part in logits if part is not None], decoding.cache.stored


@pytest.mark.parametrize("rows_transposed", [1, 8])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, [PROMPTS[0], [9]]], ids=["one", "two", "ragged"])
@pytest.mark.parametrize("name", MODELS)
def test_as_layer_by_layer(
    name: str, prompts: list[list[int]], rows_transposed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_token, "_ROWS", rows_transposed)
    model = build(name)
    (slow, slow_cache), (fast, fast_cache) = steps(model, prompts, False), steps(model, prompts, True)
    assert len(fast) == 3
    for ours, oracle in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(fast_cache, slow_cache, rtol=1e-4, atol=2e-5)


SETTINGS: list[dict[str, Any]] = [
    {"start": "hub_leaning", "gate_input": "normalised"},
    {"projection_rank": 3},
    {"alternating": False, "output": "mixture", "expert_stream": "unchanged"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["leaning", "low-rank", "mixture"])
def test_kinds_of_stitches(settings: dict[str, Any]) -> None:
    model = stitched(None, num_stitch_layers=3, **settings)
    fast = OneToken.of(model)
    assert fast is not None
    assert [stitch is None for stitch in fast.stitches] == ["projection_rank" in settings] * 3
    (slow, _), (ours, _) = steps(model, PROMPTS, False), steps(model, PROMPTS, True)
    torch.testing.assert_close(ours, slow, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_as_near_as_layer_by_layer() -> None:
    exact, model = stitched(None, num_stitch_layers=3), stitched(None, num_stitch_layers=3).to(torch.bfloat16)
    model.dtype = model.stitch_dtype = torch.bfloat16
    expected = torch.stack(steps(exact, PROMPTS, False)[0])
    slow, fast = (torch.stack(steps(model, PROMPTS, way)[0]).float() for way in (False, True))
    errors = [float((found - expected).norm() / expected.norm()) for found in (slow, fast)]
    assert 0 < errors[1] < 1.2 * errors[0] < 0.2


def test_members_in_another_dtype_than_the_stitches() -> None:
    model = random_model(config_of(num_stitch_layers=3), torch.float64, frozen=torch.float32)
    slow, fast = (torch.stack(steps(model, PROMPTS, way)[0]) for way in (False, True))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_parameters_keep_their_values_are_held_once_and_train_on() -> None:
    model, untouched = stitched(None, num_stitch_layers=2), stitched(None, num_stitch_layers=2)
    first = OneToken.of(model)
    assert first is not None
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in untouched.named_parameters()}
    for (name, ours), (_, theirs) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.is_contiguous()
        assert ours.requires_grad == theirs.requires_grad
        assert not ours.is_inference()
    again = OneToken.of(model)
    assert again is not None
    assert again.layers[3].gate_up.data_ptr() == first.layers[3].gate_up.data_ptr()
    assert generate(model, PROMPTS, GenerationSettings(3)) == generate(untouched, PROMPTS, GenerationSettings(3))
    for one in (model, untouched):
        loss(one).backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name
    with torch.no_grad():  # an optimizer's step is seen by what is there already
        weight = model.stitches["1"].gates["hub"].weight  # type: ignore[index, union-attr, operator]
        weight.add_(1.0)  # type: ignore[union-attr, operator]
    stitch = first.stitches[1]
    assert stitch is not None
    assert torch.equal(stitch.gates[0], weight)  # type: ignore[arg-type]


def loss(model: BTSModel) -> Tensor:
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    return sequence_loss(model, tokens[:, :-1], tokens[:, 1:], torch.ones(1, 4))


def test_a_dense_model_is_left_as_it_is() -> None:
    model = dense()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert OneToken.of(model) is not None
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("moe", [MoEConfig(MEMBERS), MoEConfig(MEMBERS, attention_experts=True)], ids=["btx", "bam"])
def test_routed_layers_run_as_they_are(moe: MoEConfig) -> None:
    backend = TorchBackend(torch.float32, "cpu", ParallelMesh().tp)
    assert OneToken.of(MoEModel(ModelConfig(**SIZES), moe, backend)) is None
    assert OneToken.of(Ensemble(ModelConfig(**SIZES), BTMConfig(MEMBERS), backend)) is None
