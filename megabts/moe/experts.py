"""A layer's ffn experts: SwiGLU feed-forwards in two stacked matrices, and tokens dealt among them, none dropped."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabts.model.backend import Backend, Recompute
from megabts.model.torch_backend import swiglu
from megabts.moe.adapters import Adapters
from megabts.moe.dispatch import Broadcast, Dispatch, held_by
from megabts.moe.router import Routes
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
"""Products of blocks of rows with a matrix each, in one kernel; public since torch 2.10."""


class FFNExperts(nn.Module):
    """down_i(silu(gate_i x) * up_i x) for N ffn experts i of width F.

    Parameters `gate_up` [N, 2 F, D], gate before up, and `down` [N, D, F], both split along F over tp and along N over
    the axis `experts`, whose size divides N. `adapters`: of the outputs, before they are weighted.
    """

    def __init__(
        self,
        num_ffn_experts: int,
        hidden_size: int,
        width: int,
        stds: tuple[float, float],
        backend: Backend,
        recompute: Recompute,
        experts: Axis,
        *,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__()
        n, d, f = num_ffn_experts, hidden_size, width
        self.num_ffn_experts, self.recompute, self.axis = n, recompute, experts
        self.adapters, self.fuse = adapters, backend.fuse
        held = held_by(experts, n)
        self.metas = {
            "gate_up": ParamMeta((n, 2 * f, d), "normal", stds[0], dim=1, parts=(f, f), held=held),
            "down": ParamMeta((n, d, f), "normal", stds[1], dim=2, held=held),
        }
        self.gate_up, self.down = (
            nn.Parameter(torch.empty(meta.local_shape(backend.tp), dtype=backend.dtype, device=backend.device))
            for meta in self.metas.values()
        )

    def forward(self, hidden: Tensor, routes: Routes) -> Tensor:
        """Tokens [T, D] -> the weighted sums of their ffn experts' outputs, [T, D]: over tp, partial sums."""
        weights = routes.weights.to(hidden.dtype)
        if routes.everywhere:
            return self._all(hidden, weights)
        dispatch = Dispatch(routes.chosen, self.num_ffn_experts, self.axis)
        rows = dispatch.out(hidden)
        if self._groups(rows):
            outputs = self._run_grouped(rows, dispatch.counts)
        else:
            outputs = torch.cat(self._run_each(rows.split(dispatch.counts.tolist())))
        outputs = dispatch.home(outputs)
        return (weights.unsqueeze(1) @ outputs).squeeze(1)

    def _all(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Every token through every ffn expert; `weights` [T, N]."""
        everywhere = Broadcast(len(hidden), hidden.device, self.axis)
        rows = everywhere.out(hidden.unsqueeze(0))
        shares = everywhere.out(weights.unflatten(1, (self.axis.size, -1)).transpose(0, 1))
        outputs = self._run_each([rows] * len(self.down))
        return everywhere.home((shares.unsqueeze(1) @ torch.stack(outputs, 1)).squeeze(1))

    def _groups(self, rows: Tensor) -> bool:
        """Whether the grouped product is for these: bfloat16 in rows of a multiple of 16 bytes, on a GPU. On CPU, where
        it works too, it is no faster."""
        aligned = rows.shape[1] % 8 == 0 and self.down.shape[2] % 8 == 0
        usable = rows.is_cuda and rows.dtype == torch.bfloat16 and aligned
        return usable and len(rows) > 0 and self.adapters is None

    def _run_grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Each ffn expert on its block of `rows`, all in two kernels; nothing waits for the device."""
        ends = counts.cumsum(0, dtype=torch.int32)
        wide = self._activate(grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends))
        out: Tensor = grouped_mm(wide, self.down.transpose(1, 2), offs=ends)
        return out

    def _run_each(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Each ffn expert on its block of rows, one after another."""
        matrices = zip(blocks, self.gate_up.unbind(0), self.down.unbind(0), strict=True)
        outputs = [F.linear(self._activate(F.linear(rows, gate_up)), down) for rows, gate_up, down in matrices]
        return outputs if self.adapters is None else self.adapters(outputs)

    def _activate(self, wide: Tensor) -> Tensor:
        if self.recompute == "selective" and torch.is_grad_enabled():
            out: Tensor = checkpoint(swiglu, wide, self.fuse, use_reentrant=False)
            return out
        return swiglu(wide, self.fuse)
