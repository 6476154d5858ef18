"""A layer's ffn experts: N SwiGLU feed-forwards in two stacked matrices, and tokens dealt among them, none dropped.

Tokens are sorted by ffn expert, so each works on one block of rows. Sorting is a permutation; its backward is the
reverse one, not a sum over scattered rows, so that equal inputs give equal bits on any device.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabts.model.backend import Backend, Recompute
from megabts.model.torch_backend import swiglu
from megabts.moe.adapters import Adapters
from megabts.moe.router import Routes
from megabts.parallel.sharding import ParamMeta


class FFNExperts(nn.Module):
    """down_i(silu(gate_i x) * up_i x) for N ffn experts i of width F.

    Parameters `gate_up` [N, 2 F, D], gate before up, and `down` [N, D, F], both split along F over tp. `adapters`: of
    the ffn experts' outputs, before they are weighted.
    """

    def __init__(
        self,
        num_ffn_experts: int,
        hidden_size: int,
        width: int,
        stds: tuple[float, float],
        backend: Backend,
        recompute: Recompute,
        *,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__()
        n, d, f = num_ffn_experts, hidden_size, width
        self.recompute = recompute
        self.adapters = adapters
        self.metas = {
            "gate_up": ParamMeta((n, 2 * f, d), "normal", stds[0], dim=1, parts=(f, f)),
            "down": ParamMeta((n, d, f), "normal", stds[1], dim=2),
        }
        self.gate_up, self.down = (
            nn.Parameter(torch.empty(meta.local_shape(backend.tp), dtype=backend.dtype, device=backend.device))
            for meta in self.metas.values()
        )

    def forward(self, hidden: Tensor, routes: Routes) -> Tensor:
        """Tokens [T, D] -> the weighted sums of their ffn experts' outputs, [T, D]: over tp, partial sums."""
        weights = routes.weights.to(hidden.dtype)
        experts = list(zip(self.gate_up.unbind(0), self.down.unbind(0), strict=True))
        if routes.everywhere:
            outputs = self._adapt([self._run(hidden, *expert) for expert in experts])
            return (weights.unsqueeze(1) @ torch.stack(outputs, 1)).squeeze(1)
        num_tokens, k = routes.chosen.shape
        order = routes.chosen.flatten().argsort(stable=True)  # of the T k choices, token after token
        back = order.argsort()
        counts = routes.chosen.flatten().bincount(minlength=len(experts)).tolist()
        blocks = _Deal.apply(hidden, order, back, k).split(counts)
        sorted_outputs = self._adapt([self._run(rows, *expert) for rows, expert in zip(blocks, experts, strict=True)])
        outputs = _Permute.apply(torch.cat(sorted_outputs), back, order).view(num_tokens, k, -1)
        return (weights.unsqueeze(1) @ outputs).squeeze(1)

    def _adapt(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs if self.adapters is None else self.adapters(outputs)

    def _run(self, rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        wide = F.linear(rows, gate_up)
        if self.recompute == "selective" and torch.is_grad_enabled():
            return F.linear(checkpoint(swiglu, wide, use_reentrant=False), down)
        return F.linear(swiglu(wide), down)


class _Deal(torch.autograd.Function):
    """Row i of the result is the token that choice order[i] belongs to: [T, D] -> [T k, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad[back].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """x[order], where order[back] counts up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad[back], None, None
