"""Which states need a gradient, against what autograd records."""

from typing import Any

import pytest
import torch

from megabts.bts.flow import gradient_flow, needs_gradient
from megabts.bts.plan import StitchPoint
from megabts.model.attention import make_context
from tests.bts.reference import config_of, random_model

TOKENS = torch.tensor([[3, 7, 1]])


@pytest.mark.parametrize("stream", ["projected", "unchanged"])
@pytest.mark.parametrize("alternating", [True, False])
@pytest.mark.parametrize(
    ("stitches", "placement"), [(1, []), (2, []), (4, []), (5, []), (3, [3, 4, 5]), (3, [1, 4, 5])]
)
def test_as_autograd_records(stitches: int, placement: list[int], alternating: bool, stream: str) -> None:
    shape: dict[str, Any] = {"num_stitch_layers": stitches, "alternating": alternating, "expert_stream": stream}
    shape["placement"] = placement
    for trainable in (["*"], ["e1"], ["e2", "hub"], ["hub"], []):
        model = random_model(config_of(2, trainable=trainable, **shape))
        seen: list[list[bool]] = []
        for stitch in model.stitches.values():
            stitch.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append([state.requires_grad for state in args[0]])
            )
        context = make_context(model.config, torch.arange(3), model.dtype)
        hidden = model.run_layers(0, 5, model.embed(TOKENS), context)
        for index, flow in enumerate(model.flows):
            assert seen[index] == [name in flow.before for name in ("hub", "e1", "e2")], (trainable, index)
        assert hidden.requires_grad == bool(model.flows[-1].after)


def test_states_between_stitches() -> None:
    plan = [StitchPoint(2, "hub_into_experts"), StitchPoint(5, "experts_into_hub")]
    flows = gradient_flow(plan, config_of(2, trainable=["e2"]))
    found = [sorted(needs_gradient(flows, depth)) for depth in range(6)]
    assert found == [[], [], ["e2"], ["e2"], ["e2"], ["hub"]]
    assert [sorted(flow.trained) for flow in flows] == [["e2"], ["e2"]]
