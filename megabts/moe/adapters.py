"""Adapters on experts' outputs: all that trains, beside routers, of members that stay frozen (arXiv 2502.00075)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabts.model.backend import Backend
from megabts.moe.dispatch import held_by
from megabts.parallel.collectives import HIDDEN, reduce_scatter
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta


class Adapters(nn.Module):
    """A linear map D -> D of each of N experts' outputs, identity at the start; parameter `weight` [N, out D, in D].

    Inside a tensor-parallel region outputs are partial sums. A rank adds up its D / tp dimensions of them, applies its
    columns of the map, and so has a part of the next sum: neither work nor weights are repeated over tp. A rank of the
    axis `experts` has those of its share of the experts.
    """

    def __init__(self, num_experts: int, hidden_size: int, backend: Backend, experts: Axis | None = None) -> None:
        super().__init__()
        self.tp = backend.tp
        held = held_by(experts, num_experts) if experts else None
        meta = ParamMeta((num_experts, hidden_size, hidden_size), "identity", dim=2, held=held)
        self.metas = {"weight": meta}
        self.weight = nn.Parameter(torch.empty(meta.local_shape(self.tp), dtype=backend.dtype, device=backend.device))

    def forward(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        """Each expert's partial sums [.., D], in order -> those of what its adapter makes of them."""
        pairs = zip(outputs, self.weight.unbind(0), strict=True)
        return [F.linear(reduce_scatter(output, self.tp, HIDDEN), weight) for output, weight in pairs]
