"""What each part of a BTS model costs in training, for the pipeline's cuts.

Members are frozen: all their layers run forward, and backward only where their states need a gradient (`bts.flow`).
Layers up to the first trainable stitch cost no backward, so a balanced pipeline gives its first stages more of them.
"""

from collections.abc import Collection

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
    ranks = [_layers(model, bts, seq_length, recompute, placement) for placement in placements]
    head = head_flops(model)
    flows = gradient_flow(stitch_plan(model.num_layers, bts.num_stitch_layers, bts.alternating), bts)
    passes = HUB in needs_gradient(flows, model.num_layers)
    return Costs(
        embedding=Cost(),
        layers=tuple(Cost(max(c.forward for c in row), max(c.backward for c in row)) for row in zip(*ranks)),
        head=Cost(head, head if passes else 0.0),
    )


def _layers(model: ModelConfig, bts: BTSConfig, seq_length: int, recompute: bool, placement: Placement) -> list[Cost]:
    """Each layer of one expert-parallel rank's members, with the stitch after it."""
    plan = stitch_plan(model.num_layers, bts.num_stitch_layers, bts.alternating)
    flows = gradient_flow(plan, bts)
    stitches = {flow.point.after: flow for flow in flows}
    layer, linear = layer_flops(model, seq_length), 2.0 * model.hidden_size**2
    costs = []
    for depth in range(model.num_layers):
        passing = len(needs_gradient(flows, depth) & set(placement.local))
        cost = Cost(len(placement.local) * layer, passing * layer * (2 if recompute else 1))
        if depth + 1 in stitches:
            cost += _stitch(stitches[depth + 1], placement, linear)
        costs.append(cost)
    return costs


def _stitch(flow: StitchFlow, placement: Placement, linear: float) -> Cost:
    """One rank's share of a stitch: D x D matrices, of its members' projections and of the gates that it computes.

    Projections read the expert (Experts-into-Hub) or the hub (Hub-into-Experts), gates the hub. A frozen matrix passes
    gradient only if the state it reads needs it, and has no gradient of its own.
    """
    merges = flow.point.kind == "experts_into_hub"
    gathers = merges and placement.exchange == "gather"
    gates: Collection[str] = placement.local
    if gathers:
        gates = placement.members if placement.has_hub else ()
    matrices = [(name, HUB) for name in gates if merges or name != HUB]
    matrices += [(name, name if merges else HUB) for name in placement.experts]
    weight = sum(linear for owner, _ in matrices if owner in flow.trained)
    passing = sum(linear for owner, source in matrices if owner in flow.trained or source in flow.before)
    return Cost(linear * len(matrices), passing + weight)
