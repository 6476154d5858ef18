"""Recording gate values: how much of each member every token takes at every stitch layer.

The gate is a vector per member and token; what is recorded is its mean over the hidden dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from megabts.bts.model import BTSModel


@dataclass
class GateRecord:
    """Mean gates of the forward passes that ran while recording."""

    layers: dict[int, list[Tensor]] = field(default_factory=dict)
    """By stitch layer: one tensor [members gated, s, b] a forward pass, float32 on CPU. Experts-into-Hub gates begin
    with the hub's and sum to 1 over members; Hub-into-Experts gates belong to the experts alone."""

    def add(self, stitch: int, means: Tensor) -> None:
        """Keep the mean gates of one pass through a stitch layer."""
        self.layers.setdefault(stitch, []).append(means.cpu())


@contextmanager
def record_gates(model: BTSModel) -> Iterator[GateRecord]:
    """Record the gates of every forward pass of `model` inside the block; ranks that share a model do it together."""
    record = GateRecord()
    with model.observe_gates(record.add):
        yield record
