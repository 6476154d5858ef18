"""The planner's table of methods: what gives a method's parts, operations and stages."""

from collections.abc import Callable
from dataclasses import dataclass

from megabts.bts.flops import bts_flops
from megabts.bts.plan import stitch_plan
from megabts.build import model_costs
from megabts.config.run import RunConfig
from megabts.model.flops import dense_flops
from megabts.moe.flops import moe_flops
from megabts.parallel.balance import Costs
from megabts.planner.bts import bts_parts
from megabts.planner.decoder import decoder_parts
from megabts.planner.moe import moe_parts
from megabts.planner.work import Parts


@dataclass(frozen=True)
class Method:
    """A method as the planner sees it. Every function reads the layout from the configuration's `parallel`."""

    parts: Callable[[RunConfig, int], Parts]
    """(configuration, expert-parallel rank) -> what the rank has."""
    costs: Callable[[RunConfig], Costs]
    """Operations per token of the parts on the busiest expert-parallel rank, over all of tp."""
    flops: Callable[[RunConfig], float]
    """Model FLOPs per token, as `model.flops` counts them."""
    splits_samples: bool = False
    """Expert-parallel ranks have samples of their own, and are data-parallel in what they all hold."""


def _bts_flops(config: RunConfig) -> float:
    bts, model = config.bts, config.model
    plan = stitch_plan(model.num_layers, bts)
    return bts_flops(model, bts, config.data.seq_length, plan).total


METHODS = {
    "dense": Method(decoder_parts, model_costs, lambda config: dense_flops(config.model, config.data.seq_length).total),
    "bts": Method(bts_parts, model_costs, _bts_flops),
    "moe": Method(
        moe_parts,
        model_costs,
        lambda config: moe_flops(config.model, config.moe, config.data.seq_length).total,
        splits_samples=True,
    ),
}
"""By the trainer's name. Others need no plan: they run data-parallel alone, or train nothing."""
