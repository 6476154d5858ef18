"""Where the stitch layers sit and of which kind they are (BTS, arXiv 2502.00075, section 3, figure 2).

A stitch layer follows every floor(L/K) layers, or those that `bts.placement` names; the last of the K always follows
layer L and is Experts-into-Hub, since its output is the model's. Going back from it the kinds alternate.
"""

from dataclasses import dataclass
from typing import Literal

from megabts.config.methods import BTSConfig
from megabts.errors import UsageError

Kind = Literal["hub_into_experts", "experts_into_hub"]
TITLES: dict[Kind, str] = {"hub_into_experts": "Hub-into-Experts", "experts_into_hub": "Experts-into-Hub"}
"""What people call them."""


@dataclass(frozen=True)
class StitchPoint:
    """One stitch layer: it follows the first `after` layers."""

    after: int
    kind: Kind

    @property
    def title(self) -> str:
        """For people: "layer 2, Hub-into-Experts"."""
        return f"layer {self.after}, {TITLES[self.kind]}"


def stitch_plan(num_layers: int, bts: BTSConfig) -> list[StitchPoint]:
    """The K stitch points of an L-layer model, in order.

    Raises UsageError when K exceeds L, or `bts.placement` does not end with L.
    """
    number = bts.num_stitch_layers
    if number > num_layers:
        raise UsageError(
            f"bts.num_stitch_layers {number} is more than the members' {num_layers} layers; use one a layer at most"
        )
    if bts.placement and bts.placement[-1] != num_layers:
        raise UsageError(
            f"bts.placement {bts.placement} ends with layer {bts.placement[-1]}; end it with the members' last layer, "
            f"{num_layers}"
        )
    spacing = num_layers // number
    places = bts.placement or [*range(spacing, number * spacing, spacing), num_layers]
    points = []
    for index, after in enumerate(places, start=1):
        into_hub = not bts.alternating or (number - index) % 2 == 0
        points.append(StitchPoint(after, "experts_into_hub" if into_hub else "hub_into_experts"))
    return points
