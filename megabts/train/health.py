"""Adam's health during training, per layer: the figures that foretell an instability (arXiv 2304.09871).

Every rank sums over its shards of the optimizer's state; the sums of all ranks, which hold other elements or other
layers, are added.
"""

import logging

import torch
from torch import Tensor

from megabts.optimizer.adamw import MasterAdamW
from megabts.optimizer.stability import AdamMonitor
from megabts.parallel.collectives import gather_objects

log = logging.getLogger(__name__)


def adam_health(optimizer: MasterAdamW, monitor: AdamMonitor, updates: int) -> dict[str, float]:
    """Update norm, cosine with the gradient and bimodality of every layer after `updates` updates, by name.

    A layer whose updates are bimodal near +-1 is also reported as a warning. Every rank must call it, and gets all
    layers.
    """
    sums: dict[str, Tensor] = {}
    for name, gradient, first, second in optimizer.named_state():
        layer, statistics = layer_of(name), monitor.statistics(gradient, first, second, updates)
        sums[layer] = sums[layer] + statistics if layer in sums else statistics
    figures = {}
    for layer, statistics in _over_ranks(sums).items():
        health = monitor.health(statistics, updates)
        figures[f"adam_update_norm/{layer}"] = health.update_norm
        figures[f"adam_cosine/{layer}"] = health.cosine
        figures[f"adam_bimodality/{layer}"] = health.bimodality
        if health.warning:
            log.warning(f"Adam's updates of {layer} are bimodal near +-1 ({health.bimodality:.2f}); a spike may follow")
    return figures


def _over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of all ranks, layer by layer."""
    found: dict[str, Tensor] = {}
    values = torch.stack(list(sums.values())).tolist() if sums else []
    for part in gather_objects(dict(zip(sums, values, strict=True))):
        for layer, statistics in part.items():
            more = torch.tensor(statistics, dtype=torch.float64)
            found[layer] = found[layer] + more if layer in found else more
    return found


def layer_of(name: str) -> str:
    """The group a parameter is watched in: "layers.3.mlp.down.weight" -> "layers.3", "head.weight" -> "head"."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
