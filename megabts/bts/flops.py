"""Model FLOPs per token of a BTS model, counted as `model.flops` counts: only what its frozen members really need.

A BTS model costs 2P per member and token, another 2P for the layers downstream of a trainable stitch and 6P for the
stitches, not 6P per member. One simplification, a small one: a trained stitch counts three times even where its input
needs no gradient (the first stitch, the gate of the first Experts-into-Hub, and the projections of experts whose
unchanged stream no trained stitch has written).
"""

from collections.abc import Sequence

from megabts.bts.flow import StitchFlow, gradient_flow
from megabts.bts.parameters import matrix_sizes
from megabts.bts.placement import ALONE, Placement
from megabts.bts.plan import StitchPoint
from megabts.config.methods import HUB, BTSConfig
from megabts.config.model import ModelConfig
from megabts.model.flops import Flops, head_flops, layer_flops


def bts_flops(
    model: ModelConfig, bts: BTSConfig, seq_length: int, plan: Sequence[StitchPoint], *, causal: bool = True
) -> Flops:
    """Operations per training token of a BTS model (arXiv 2502.00075, section 2), on all its ranks together.

    `plan` lists the stitch layers in ascending order, an Experts-into-Hub last. The layers a member passes while its
    state needs a gradient (`flow`) cost their forward once more. Experts stop at the last Experts-into-Hub; their final
    norms and heads do not run, unless the output is a mixture.

    With stitches after every 2 layers and three experts, full attention, this gives 2.07 times the dense model's
    operations at 8 layers x 256 (vocabulary 8192, 8 heads, 4 KV heads, FFN 704, sequences of 256) and 2.46 times at
    12 layers x 512 (FFN 1408); counted causally, 2.06 and 2.46.
    """
    assert plan[-1].kind == "experts_into_hub", "a stitch plan ends with an Experts-into-Hub layer"
    layer = layer_flops(model, seq_length, causal=causal)
    flows, together = gradient_flow(plan, bts), Placement.of(bts.members, ALONE)
    total, depth = Flops(), 0
    for flow in flows:
        length = flow.point.after - depth
        assert 0 <= length <= model.num_layers - depth, "stitch positions ascend and lie within the layers"
        total += _frozen(len(bts.members) * length * layer, len(flow.before) * length * layer)
        total += stitch_flops(flow, together, *matrix_flops(bts, model.hidden_size))
        depth = flow.point.after
    read = bts.members if bts.output == "mixture" else (HUB,)
    rest = (model.num_layers - depth) * layer + head_flops(model)
    return total + _frozen(len(read) * rest, len(flows[-1].after.intersection(read)) * rest)


def _frozen(forward: float, passing: float) -> Flops:
    """Frozen work, of which `passing` lies downstream of a trainable weight."""
    return Flops(forward, passing, 0.0)


def matrix_flops(bts: BTSConfig, hidden_size: int) -> tuple[float, float]:
    """Forward operations per token of (a projection, a gate slice)."""
    projection, gate = (2.0 * size for size in matrix_sizes(bts, hidden_size))
    return projection, gate


def stitch_flops(flow: StitchFlow, placement: Placement, projection: float, gate: float) -> Flops:
    """One rank's share of a stitch layer; all of it where all members are on one.

    A projection for each of its experts and the gate slices that are here, of so many forward operations each.
    Projections read the expert (Experts-into-Hub) or the hub (Hub-into-Experts), gates always the hub. A frozen matrix
    passes gradient only if the state it reads needs it.
    """
    merges = flow.point.kind == "experts_into_hub"
    readers = [(name, HUB, gate) for name in placement.gated(flow.point.kind)]
    readers += [(name, name if merges else HUB, projection) for name in placement.experts]
    forward = sum(cost for _, _, cost in readers)
    weight = sum(cost for owner, _, cost in readers if owner in flow.trained)
    passing = sum(cost for owner, source, cost in readers if owner in flow.trained or source in flow.before)
    return Flops(forward, passing, weight)
