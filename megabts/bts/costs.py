"""What each part of a BTS model costs in training, for the pipeline's cuts.

Members are frozen: all their layers run forward, and backward only where their states need a gradient (`bts.flow`).
Layers up to the first trainable stitch cost no backward, so a balanced pipeline gives its first stages more of them.
"""

from collections.abc import Sequence

from megabts.bts.flops import matrix_flops, stitch_flops
from megabts.bts.flow import StitchFlow, gradient_flow, needs_gradient
from megabts.bts.placement import Exchange, Placement
from megabts.bts.plan import stitch_plan
from megabts.config.methods import HUB, BTSConfig
from megabts.config.model import ModelConfig
from megabts.model.flops import head_flops, layer_flops
from megabts.parallel.balance import Cost, Costs
from megabts.parallel.mesh import Axis


def bts_costs(
    model: ModelConfig,
    bts: BTSConfig,
    seq_length: int,
    *,
    recompute: bool = False,
    num_expert_ranks: int = 1,
    exchange: Exchange = "auto",
) -> Costs:
    """Operations per token; a layer has with it the stitch that follows it.

    With several expert-parallel ranks, those of the busiest at each layer: they wait for each other at the stitches.
    `recompute`: layers that have a backward run forward once more in it (train.recompute full).
    """
    placements = [
        Placement.of(bts.members, Axis("ep", num_expert_ranks, rank), exchange) for rank in range(num_expert_ranks)
    ]
    flows = gradient_flow(stitch_plan(model.num_layers, bts), bts)
    matrices = matrix_flops(bts, model.hidden_size)
    ranks = [_layers(model, flows, seq_length, recompute, placement, matrices) for placement in placements]
    head = head_flops(model)
    if bts.output == "mixture":
        head *= len(bts.members)
    passes = HUB in needs_gradient(flows, model.num_layers)
    return Costs(
        embedding=Cost(),
        layers=tuple(Cost(max(c.forward for c in row), max(c.backward for c in row)) for row in zip(*ranks)),
        head=Cost(head, head if passes else 0.0),
    )


def _layers(
    model: ModelConfig,
    flows: Sequence[StitchFlow],
    seq_length: int,
    recompute: bool,
    placement: Placement,
    matrices: tuple[float, float],
) -> list[Cost]:
    """Each layer of one expert-parallel rank's members, with the stitch after it; `matrices`: of `matrix_flops`."""
    stitches = {flow.point.after: flow for flow in flows}
    layer = layer_flops(model, seq_length)
    costs = []
    for depth in range(model.num_layers):
        passing = len(needs_gradient(flows, depth) & set(placement.local))
        cost = Cost(len(placement.local) * layer, passing * layer * (2 if recompute else 1))
        if depth + 1 in stitches:
            stitch = stitch_flops(stitches[depth + 1], placement, *matrices)
            cost += Cost(stitch.forward, stitch.backward_activation + stitch.backward_weight)
        costs.append(cost)
    return costs
