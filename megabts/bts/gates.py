"""Where members are weighed, and recording how much of each every token takes there.

A stitch layer's gate is a vector per member and token; what is recorded is its mean over the hidden dimensions. The
gate of a mixture of outputs is one number per member and token: the member's share of the next token's probabilities.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from megabts.bts.model import BTSModel
from megabts.bts.plan import TITLES

OUTPUT_TITLE = "output mixture"


@dataclass(frozen=True)
class GatePlace:
    """A stitch layer, or the output where it is a mixture."""

    after: int
    """Layers before it."""
    kind: Literal["hub_into_experts", "experts_into_hub", "output_mixture"]

    @property
    def title(self) -> str:
        """For people: "layer 2, Hub-into-Experts" or "output mixture"."""
        return OUTPUT_TITLE if self.kind == "output_mixture" else f"layer {self.after}, {TITLES[self.kind]}"

    @property
    def gates_hub(self) -> bool:
        """Whether the hub has a gate here. Then gates begin with it, and sum to 1 over members."""
        return self.kind != "hub_into_experts"


def gate_places(model: BTSModel) -> list[GatePlace]:
    """All of a model, in the order of a forward pass: the last one is nearest to what the model answers."""
    places = [GatePlace(point.after, point.kind) for point in model.plan]
    return [*places, GatePlace(model.config.num_layers, "output_mixture")] if model.mixes else places


@dataclass
class GateRecord:
    """Mean gates of the forward passes that ran while recording."""

    places: dict[int, list[Tensor]] = field(default_factory=dict)
    """By place, its number in `gate_places`: one tensor [members gated, s, b] a forward pass, float32 on CPU. Of a
    mixture there is one where logits or a loss were asked for."""

    def add(self, place: int, means: Tensor) -> None:
        """Keep the mean gates of one pass through a place."""
        self.places.setdefault(place, []).append(means.cpu())


@contextmanager
def record_gates(model: BTSModel) -> Iterator[GateRecord]:
    """Record the gates of every forward pass of `model` inside the block; ranks that share a model do it together."""
    record = GateRecord()
    with model.observe_gates(record.add):
        yield record
