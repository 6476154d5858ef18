"""Which members' states need a gradient, and where: known from plan and configuration, before anything runs.

Members are frozen and start without. A stitch gives the need to what it writes with a trained weight, or out of a state
that has it; a member keeps it from there on. FLOP counts, pipeline costs, the detaching of members at a stage's entry
and the question whether an exchange between ranks has a backward all read this one walk, so ranks that hold different
members agree without asking each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megabts.bts.plan import StitchPoint
from megabts.config.methods import HUB, BTSConfig


@dataclass(frozen=True)
class StitchFlow:
    """One stitch layer and the members whose states need a gradient on either side of it."""

    point: StitchPoint
    trained: frozenset[str]
    """Members whose slices train."""
    before: frozenset[str]
    """Members whose states need a gradient where they enter the stitch."""
    after: frozenset[str]
    """Likewise where they leave it. After the last stitch there is the hub alone, unless the output mixes all."""


def gradient_flow(plan: Sequence[StitchPoint], bts: BTSConfig) -> list[StitchFlow]:
    """The flow through every stitch of the plan, in order."""
    trained = frozenset(bts.members if "*" in bts.trainable else bts.trainable)
    flows: list[StitchFlow] = []
    needs: frozenset[str] = frozenset()
    for index, point in enumerate(plan):
        after = needs | _gained(point, bts, trained, needs)
        if index == len(plan) - 1 and bts.output == "hub":
            after &= {HUB}
        flows.append(StitchFlow(point, trained, needs, after))
        needs = after
    return flows


def needs_gradient(flows: Sequence[StitchFlow], depth: int) -> frozenset[str]:
    """Members whose states need a gradient after the first `depth` layers and the stitches among and after them.

    A pipeline stage that ends there has a backward pass, on every rank, exactly when this is not empty.
    """
    needs: frozenset[str] = frozenset()
    for flow in flows:
        if flow.point.after <= depth:
            needs = flow.after
    return needs


def _gained(point: StitchPoint, bts: BTSConfig, trained: frozenset[str], needs: frozenset[str]) -> frozenset[str]:
    """Members whose states, as this stitch writes them, depend on a trained weight."""
    if point.kind == "hub_into_experts":
        return frozenset(name for name in bts.experts if name in trained or HUB in needs)
    hub = frozenset({HUB} if trained or needs else ())
    return hub | (trained & set(bts.experts) if bts.expert_stream == "projected" else frozenset())
