"""Recording where tokens go: how evenly each layer's ffn experts are used."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabts.moe.model import MoEModel
from megabts.moe.router import Routes, balance_loss
from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis


@dataclass
class LayerRoutes:
    """Sums over the tokens that passed one layer, float64, where the model is."""

    sums: Tensor
    """[2 N + 3]: tokens that went to each ffn expert; weights given to each; entropies, nats; tokens times the balance
    loss of their micro-batch with alpha 1; tokens."""
    dropped: int = 0
    """Choices that were not carried out: none, as no ffn expert has a capacity."""

    @property
    def num_ffn_experts(self) -> int:
        """N."""
        return (len(self.sums) - 3) // 2

    @property
    def tokens(self) -> int:
        """How many were seen."""
        return int(self.sums[-1])

    @property
    def chosen(self) -> Tensor:
        """Tokens that went to each ffn expert, [N]."""
        return self.sums[: self.num_ffn_experts]

    @property
    def share(self) -> Tensor:
        """Of all tokens' choices, the part that fell on each ffn expert, [N]; sums to 1."""
        return self.chosen / self.chosen.sum()

    @property
    def mean_gate(self) -> Tensor:
        """Mean weight given to each ffn expert, [N]."""
        return self.sums[self.num_ffn_experts : -3] / self.sums[-1]

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of the router's softmax, nats: 0 is certain, ln N is uniform."""
        return (self.sums[-3] / self.sums[-1]).item()

    @property
    def mean_balance(self) -> float:
        """Mean load balancing loss with alpha 1: at its least, 1, where everything is uniform."""
        return (self.sums[-2] / self.sums[-1]).item()

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
        """Count one pass through a layer; nothing waits for the device."""
        p = routes.probabilities.double()
        picks = routes.chosen.flatten()
        counts = p.new_zeros(p.shape[1]).scatter_add_(0, picks, p.new_ones(()).expand(len(picks)))
        rest = [-torch.special.xlogy(p, p).sum(), balance_loss(routes, 1.0).double() * len(p), p.new_tensor(len(p))]
        sums = torch.cat([counts, routes.gates().double().sum(0), torch.stack(rest)])
        if layer in self.layers:
            self.layers[layer].sums += sums
        else:
            self.layers[layer] = LayerRoutes(sums)

    def over_ranks(self, num_layers: int, num_ffn_experts: int, axes: Sequence[Axis], device: torch.device) -> None:
        """Add the records of all ranks of `axes`, of a model of `num_layers`: every rank gets all layers, on the CPU.

        Every rank must call it. One transfer from the device.
        """
        table = torch.zeros(num_layers, 2 * num_ffn_experts + 3, dtype=torch.float64, device=device)
        for layer, found in self.layers.items():
            table[layer] = found.sums
        for axis in axes:
            all_reduce(table, axis)
        self.layers = {layer: LayerRoutes(sums) for layer, sums in enumerate(table.cpu())}


@contextmanager
def record_routes(model: MoEModel) -> Iterator[RouteRecord]:
    """Record the routes of every forward pass of `model` inside the block.

    With train.recompute full a layer whose backward runs inside it too is counted twice, which changes no mean.
    """
    record = RouteRecord()
    with model.observe_routes(record.add):
        yield record


def route_figures(record: RouteRecord, alpha: float) -> dict[str, float]:
    """Figures of a record of all layers by name: for each its ffn experts' shares, mean entropy, ffn experts without a
    token and the load balancing loss with `alpha`; then over all layers mean entropy, such ffn experts, dropped tokens.
    """
    figures: dict[str, float] = {}
    for layer, found in record.layers.items():
        name = f"moe/layer_{layer:02d}"
        figures |= {f"{name}/share_{index}": share for index, share in enumerate(found.share.tolist())}
        figures[f"{name}/entropy"] = found.mean_entropy
        figures[f"{name}/dead"] = len(found.dead)
        figures[f"{name}/balance_loss"] = alpha * found.mean_balance
    layers = record.layers.values()
    figures["moe/entropy"] = sum(found.mean_entropy for found in layers) / len(layers)
    figures["moe/dead"] = sum(len(found.dead) for found in layers)
    figures["moe/dropped"] = sum(found.dropped for found in layers)
    return figures
