"""Recording where tokens go: how evenly each layer's ffn experts are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabts.moe.model import MoEModel
from megabts.moe.router import Routes


@dataclass
class LayerRoutes:
    """Sums over the tokens that passed one layer, float64 on CPU."""

    tokens: int
    chosen: Tensor
    """Tokens that went to each ffn expert, [N]."""
    gates: Tensor
    """Weights given to each, summed, [N]."""
    entropy: Tensor
    """Of the router's softmax, summed, nats."""
    dropped: int = 0
    """Choices that were not carried out: none, as no ffn expert has a capacity."""

    @property
    def share(self) -> Tensor:
        """Of all tokens' choices, the part that fell on each ffn expert, [N]; sums to 1."""
        return self.chosen / self.chosen.sum()

    @property
    def mean_gate(self) -> Tensor:
        """Mean weight given to each ffn expert, [N]."""
        return self.gates / self.tokens

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of the router's softmax, nats: 0 is certain, ln N is uniform."""
        return self.entropy.item() / self.tokens

    @property
    def dead(self) -> list[int]:
        """ffn experts that no token chose."""
        return (self.chosen == 0).nonzero().flatten().tolist()


@dataclass
class RouteRecord:
    """Routes of the forward passes that ran while recording, by layer (on a pipeline rank: its own layers)."""

    layers: dict[int, LayerRoutes] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, layer: int, routes: Routes) -> None:
        """Count one pass through a layer."""
        p = routes.probabilities.double()
        n = p.shape[1]
        found = LayerRoutes(
            len(p),
            routes.chosen.flatten().bincount(minlength=n).double().cpu(),
            routes.gates().double().sum(0).cpu(),
            -torch.special.xlogy(p, p).sum().cpu(),
        )
        if layer in self.layers:
            old = self.layers[layer]
            found = LayerRoutes(
                old.tokens + found.tokens,
                old.chosen + found.chosen,
                old.gates + found.gates,
                old.entropy + found.entropy,
            )
        self.layers[layer] = found


@contextmanager
def record_routes(model: MoEModel) -> Iterator[RouteRecord]:
    """Record the routes of every forward pass of `model` inside the block.

    With train.recompute full a layer whose backward runs inside it too is counted twice, which changes no mean.
    """
    record = RouteRecord()
    with model.observe_routes(record.add):
        yield record
