"""Attention experts: the members' attentions side by side, mixed token by token (BAM, arXiv 2408.08274)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.model.attention import Attention, Context, LayerCache, qkv_metas
from megabts.model.backend import Backend, Recompute
from megabts.moe.adapters import Adapters
from megabts.moe.router import RouteObserver, Router, soft
from megabts.parallel.collectives import enter, leave


class RoutedAttention(nn.Module):
    """sum_i p_i attention_i(x), p = softmax(router(x)), x being normed hidden states.

    Every attention expert runs on every token, whose keys and values later tokens read; so all are weighted. It has
    its own cache. The region of tensor parallelism is entered once and left once for all of them.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig, backend: Backend, recompute: Recompute) -> None:
        super().__init__()
        self.tp, self.sequence = backend.tp, backend.sequence
        n, d = len(moe.members), config.hidden_size
        self.router = Router(n, d, config.init_std, backend)
        self.experts = nn.ModuleList(
            Attention(config, backend, backend.column_linear(*qkv_metas(config), entered=True), recompute, left=True)
            for _ in range(n)
        )
        self.adapters = Adapters(n, d, backend) if moe.adapters else None
        self.observers: list[RouteObserver] = []

    def forward(
        self, hidden: Tensor, context: Context, layer: int, caches: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """[s', b, D] -> the same; a cache per attention expert."""
        hidden = enter(hidden, self.tp, self.sequence)
        routes = soft(self.router(hidden).flatten(0, 1))
        for observer in self.observers:
            observer(layer, routes)
        weights = routes.weights.to(hidden.dtype).unflatten(0, hidden.shape[:2])  # [s, b, N]
        own: Sequence[LayerCache | None] = caches or [None] * len(self.experts)
        outputs = [
            expert(hidden, context, layer, cache) for expert, cache in zip(self.experts, own, strict=True)
        ]  # partial sums [s, b, D]
        if self.adapters is not None:
            outputs = self.adapters(outputs)
        mixed = weights.unsqueeze(-2) @ torch.stack(outputs, -2)
        return leave(mixed.squeeze(-2), self.tp, self.sequence)
