"""Recording where tokens go: how evenly each layer's ffn experts are used, and its attention experts (BAM).

Every token runs through every attention expert, so what is counted as its choice there is the one of most weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabts.config.methods import MoEConfig
from megabts.moe.model import MoEModel
from megabts.moe.router import Routes, balance_loss
from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis


@dataclass
class LayerRoutes:
    """Sums over the tokens that passed one layer, float64, where the model is."""

    sums: Tensor
    """[2 N + 3]: tokens that went to each expert; weights given to each; entropies, nats; tokens times the balance
    loss of their micro-batch with alpha 1; tokens."""
    dropped: int = 0
    """Choices that were not carried out: none, as no ffn expert has a capacity."""

    @property
    def num_experts(self) -> int:
        """N."""
        return (len(self.sums) - 3) // 2

    @property
    def tokens(self) -> int:
        """How many were seen."""
        return int(self.sums[-1])

    @property
    def chosen(self) -> Tensor:
        """Tokens that went to each expert, [N]."""
        return self.sums[: self.num_experts]

    @property
    def share(self) -> Tensor:
        """Of all tokens' choices, the part that fell on each expert, [N]; sums to 1."""
        return self.chosen / self.chosen.sum()

    @property
    def mean_gate(self) -> Tensor:
        """Mean weight given to each expert, [N]."""
        return self.sums[self.num_experts : -3] / self.sums[-1]

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
        """Experts that no token chose."""
        return (self.chosen == 0).nonzero().flatten().tolist()


@dataclass
class RouteRecord:
    """Routes of the forward passes that ran while recording, by layer (on a pipeline rank: its own layers)."""

    layers: dict[int, LayerRoutes] = field(default_factory=dict)
    """Of ffn experts."""
    attention: dict[int, LayerRoutes] = field(default_factory=dict)
    """Of attention experts; empty where attention is no mixture."""

    def add(self, layer: int, routes: Routes) -> None:
        """Count one pass through a layer's ffn experts; nothing waits for the device."""
        _add(self.layers, layer, routes, routes.chosen)

    def add_attention(self, layer: int, routes: Routes) -> None:
        """The same of its attention experts."""
        _add(self.attention, layer, routes, routes.probabilities.argmax(-1))

    def over_ranks(self, num_layers: int, moe: MoEConfig, axes: Sequence[Axis], device: torch.device) -> None:
        """Add the records of all ranks of `axes`, of a model of `num_layers`: every rank gets all layers, on the CPU.

        Every rank must call it. One transfer from the device.
        """
        sizes = [2 * n + 3 for n in (moe.num_ffn_experts, len(moe.members) * moe.attention_experts)]
        table = torch.zeros(num_layers, sum(sizes), dtype=torch.float64, device=device)
        for found, columns in zip((self.layers, self.attention), table.split(sizes, 1), strict=True):
            for layer, routes in found.items():
                columns[layer] = routes.sums
        for axis in axes:
            all_reduce(table, axis)
        ffn, attention = table.cpu().split(sizes, 1)
        self.layers = {layer: LayerRoutes(sums) for layer, sums in enumerate(ffn)}
        self.attention = {layer: LayerRoutes(sums) for layer, sums in enumerate(attention) if moe.attention_experts}


@torch.no_grad()
def _add(layers: dict[int, LayerRoutes], layer: int, routes: Routes, chosen: Tensor) -> None:
    p = routes.probabilities.double()
    picks = chosen.flatten()
    counts = p.new_zeros(p.shape[1]).scatter_add_(0, picks, p.new_ones(()).expand(len(picks)))
    rest = [-torch.special.xlogy(p, p).sum(), balance_loss(routes, 1.0).double() * len(p), p.new_tensor(len(p))]
    sums = torch.cat([counts, routes.gates().double().sum(0), torch.stack(rest)])
    if layer in layers:
        layers[layer].sums += sums
    else:
        layers[layer] = LayerRoutes(sums)


@contextmanager
def record_routes(model: MoEModel) -> Iterator[RouteRecord]:
    """Record the routes of every forward pass of `model` inside the block.

    With train.recompute full a layer whose backward runs inside it too is counted twice, which changes no mean.
    """
    record = RouteRecord()
    with model.observe_routes(record.add), model.observe_routes(record.add_attention, attention=True):
        yield record


def route_figures(record: RouteRecord, alpha: float) -> dict[str, float]:
    """Figures of a record of all layers by name: for each its ffn experts' shares, mean entropy, ffn experts without a
    token and the load balancing loss with `alpha`; then over all layers mean entropy, such ffn experts, dropped tokens.

    Of attention experts, under names with `attention_`, also their mean weights; there is no load of theirs to balance,
    and nothing to drop.
    """
    figures: dict[str, float] = {}
    for layer, found in record.layers.items():
        figures |= _layer_figures(f"moe/layer_{layer:02d}/", found)
        figures[f"moe/layer_{layer:02d}/balance_loss"] = alpha * found.mean_balance
    figures |= _overall("moe/", record.layers)
    figures["moe/dropped"] = sum(found.dropped for found in record.layers.values())
    for layer, found in record.attention.items():
        name = f"moe/layer_{layer:02d}/attention_"
        figures |= _layer_figures(name, found)
        figures |= {f"{name}weight_{index}": weight for index, weight in enumerate(found.mean_gate.tolist())}
    return figures | (_overall("moe/attention_", record.attention) if record.attention else {})


def _layer_figures(name: str, found: LayerRoutes) -> dict[str, float]:
    shares = {f"{name}share_{index}": share for index, share in enumerate(found.share.tolist())}
    return {**shares, f"{name}entropy": found.mean_entropy, f"{name}dead": len(found.dead)}


def _overall(name: str, layers: Mapping[int, LayerRoutes]) -> dict[str, float]:
    entropies = [found.mean_entropy for found in layers.values()]
    dead = sum(len(found.dead) for found in layers.values())
    return {f"{name}entropy": sum(entropies) / len(entropies), f"{name}dead": dead}
