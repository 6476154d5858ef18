"""Which ffn experts a token goes through, with what weights: the routings of Branch-Train-MiX (arXiv 2403.07816).

Pure functions of the router's logits [T, N], T tokens and N ffn experts. Below, p = softmax(logits).

    topk     the k largest logits; weights: softmax over these alone
    switch   the largest; its weight is its p (Fedus et al., arXiv 2101.03961), without a capacity: no token is dropped
    soft     all, weighted by p
    sample   training: y = softmax((logits + Gumbel noise) / temperature), of which the largest is kept with its value;
             inference: the largest logit with weight 1, our reading of "hard sampling": it needs no random numbers

The load balancing loss of a layer is alpha N sum_i u_i p_i, u_i the mean weight given to i and p_i the mean of p, over
the tokens of a micro-batch, masked ones too; it is differentiated through both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabts.config.methods import Routing
from megabts.model.backend import Backend
from megabts.parallel.sharding import ParamMeta, name_seed


@dataclass(frozen=True)
class Routes:
    """Where T tokens go."""

    chosen: Tensor
    """ffn experts of each token, int64 [T, k]."""
    weights: Tensor
    """Of these, [T, k]."""
    probabilities: Tensor
    """p, [T, N]."""

    everywhere: bool = False
    """Every token goes through every ffn expert, in order."""

    def gates(self) -> Tensor:
        """Weights of all ffn experts, [T, N]; 0 for those not chosen."""
        return torch.zeros_like(self.probabilities).scatter(1, self.chosen, self.weights)


RouteObserver = Callable[[int, Routes], None]
"""Told of a layer and its routes."""


def top_k(logits: Tensor, k: int) -> Routes:
    """The k largest, weighted by the softmax over them."""
    values, chosen = logits.topk(k)
    return Routes(chosen, values.softmax(-1), logits.softmax(-1))


def switch(logits: Tensor) -> Routes:
    """The likeliest, weighted by its probability."""
    probabilities = logits.softmax(-1)
    weights, chosen = probabilities.max(-1, keepdim=True)
    return Routes(chosen, weights, probabilities)


def soft(logits: Tensor) -> Routes:
    """All of them, weighted by their probabilities."""
    probabilities = logits.softmax(-1)
    chosen = torch.arange(logits.shape[1], device=logits.device).expand(*logits.shape)
    return Routes(chosen, probabilities, probabilities, everywhere=True)


def sample(logits: Tensor, noise: Tensor | None, temperature: float) -> Routes:
    """One, sampled with Gumbel `noise` [T, N]; None: the likeliest, with weight 1 (inference)."""
    probabilities = logits.softmax(-1)
    if noise is None:
        chosen = logits.argmax(-1, keepdim=True)
        return Routes(chosen, torch.ones_like(chosen, dtype=logits.dtype), probabilities)
    weights, chosen = ((logits + noise) / temperature).softmax(-1).max(-1, keepdim=True)
    return Routes(chosen, weights, probabilities)


def temperature_at(step: int) -> float:
    """Of sampled routing after `step` training steps: max(0.5, exp(-1e-4 step))."""
    return max(0.5, math.exp(-1e-4 * step))


def gumbel_noise(s: int, num_ffn_experts: int, seeds: Sequence[int], device: torch.device) -> Tensor:
    """Gumbel noise [s, b, N] in float32; that of sample j depends on seeds[j] alone, so on no topology."""
    waits = torch.empty(s, len(seeds), num_ffn_experts, device=device)
    for sample_number, seed in enumerate(seeds):
        generator = torch.Generator(device).manual_seed(seed)
        waits[:, sample_number] = torch.empty(s, num_ffn_experts, device=device).exponential_(generator=generator)
    return waits.log_().neg_()


def route(
    logits: Tensor, routing: Routing, k: int, *, layer: int, seeds: Sequence[int] | None = None, step: int = 0
) -> Routes:
    """Routes of logits [s, b, N], flattened to T = s b tokens; `seeds`: of each sample (None: inference)."""
    flat = logits.flatten(0, 1)
    if routing == "topk":
        return top_k(flat, k)
    if routing == "switch":
        return switch(flat)
    if routing == "soft":
        return soft(flat)
    noise = None
    if seeds is not None:
        own = [name_seed(f"router {layer}", seed) for seed in seeds]
        noise = gumbel_noise(len(logits), logits.shape[-1], own, logits.device).flatten(0, 1).to(flat.dtype)
    return sample(flat, noise, temperature_at(step))


def balance_loss(routes: Routes, alpha: float) -> Tensor:
    """alpha N sum_i u_i p_i, a scalar: at its least, alpha, where everything is uniform and the weights sum to 1."""
    given, likely = routes.gates().mean(0), routes.probabilities.mean(0)
    return alpha * len(likely) * (given * likely).sum()


def with_loss(x: Tensor, loss: Tensor, scale: float) -> Tensor:
    """`x`; in backward `loss` gets the gradient `scale`, whatever the gradient of `x` is.

    So a loss inside the model needs no way out of it: not through a pipeline, not into the reported cross-entropy.
    """
    out: Tensor = _WithLoss.apply(x, loss, scale)
    return out


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype, ctx.device = scale, loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=ctx.device), None


class Router(nn.Module):
    """Linear map of a token's hidden state to N logits, in float32 at least; parameter `weight` [N, D], whole.

    Every tensor-parallel rank adds its slice of the ffn experts' outputs, so it sees a part of the weights' gradient,
    and the router's parameter and input get parts that add up.
    """

    def __init__(self, num_ffn_experts: int, hidden_size: int, std: float, backend: Backend) -> None:
        super().__init__()
        self.metas = {"weight": ParamMeta((num_ffn_experts, hidden_size), "normal", std, summed=True)}
        self.weight = nn.Parameter(
            torch.empty(num_ffn_experts, hidden_size, dtype=backend.dtype, device=backend.device)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[s, b, D] -> logits [s, b, N]."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(exact), self.weight.to(exact))
