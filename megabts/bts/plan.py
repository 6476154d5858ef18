"""Where the stitch layers sit and of which kind they are (BTS, arXiv 2502.00075, section 3, figure 2).

A stitch layer follows every floor(L/K) layers; the last of the K always follows layer L and is Experts-into-Hub, since
its output is the model's. Going back from it the kinds alternate.
"""

from dataclasses import dataclass
from typing import Literal

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


def stitch_plan(num_layers: int, num_stitch_layers: int, alternating: bool = True) -> list[StitchPoint]:
    """The K stitch points of an L-layer model, in order.

    Raises UsageError when K exceeds L.
    """
    if num_stitch_layers > num_layers:
        raise UsageError(
            f"bts.num_stitch_layers {num_stitch_layers} is more than the members' {num_layers} layers; use one a layer "
            "at most"
        )
    spacing = num_layers // num_stitch_layers
    points = []
    for index in range(1, num_stitch_layers + 1):
        last = index == num_stitch_layers
        into_hub = not alternating or (num_stitch_layers - index) % 2 == 0
        kind: Kind = "experts_into_hub" if into_hub else "hub_into_experts"
        points.append(StitchPoint(num_layers if last else index * spacing, kind))
    return points
