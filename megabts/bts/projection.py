"""The matrices of a stitch: projections of a member's state, full or I + U V, and gates, per dimension or per token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabts.config.methods import BTSConfig
from megabts.model.backend import Backend
from megabts.parallel.sharding import ParamMeta

DOWN_STD = 0.02
"""Standard deviation of V at the start."""


def make_projection(hidden_size: int, config: BTSConfig, backend: Backend) -> nn.Module:
    """Hidden states [s, b, D] that have entered -> [s, b, D / tp]; the identity at the start."""
    if config.projection_rank:
        return LowRank(hidden_size, config.projection_rank, backend)
    return backend.column_linear(ParamMeta((hidden_size, hidden_size), "identity", dim=0), entered=True)


def make_gate(hidden_size: int, config: BTSConfig, backend: Backend) -> nn.Module:
    """Hidden states [s, b, D] that have entered -> gate logits [s, b, D / tp], or [s, b, 1] on each rank."""
    if config.gate == "token":
        return Replicated(ParamMeta((1, hidden_size), summed=True), backend)
    return backend.column_linear(ParamMeta((hidden_size, hidden_size), dim=0), entered=True)


class Replicated(nn.Module):
    """A linear [s, b, in] -> [s, b, out] that is whole on every rank of tp, of whose result each uses a part."""

    def __init__(self, meta: ParamMeta, backend: Backend) -> None:
        super().__init__()
        self.metas = {"weight": meta}
        self.weight = nn.Parameter(torch.empty(meta.shape, dtype=backend.dtype, device=backend.device))

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in] -> [s, b, out]."""
        return F.linear(x, self.weight)


class LowRank(nn.Module):
    """x + U (V x): parameters `down.weight` [r, D], which is V, and `up.weight` [D, r], which is U and starts at 0."""

    def __init__(self, hidden_size: int, rank: int, backend: Backend) -> None:
        super().__init__()
        self.tp = backend.tp
        self.down = Replicated(ParamMeta((rank, hidden_size), "normal", DOWN_STD, summed=True), backend)
        self.up = backend.column_linear(ParamMeta((hidden_size, rank), dim=0), entered=True)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, D] -> [s, b, D / tp]."""
        low: Tensor = self.up(self.down(x))
        return x.chunk(self.tp.size, -1)[self.tp.rank] + low
