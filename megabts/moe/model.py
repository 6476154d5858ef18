"""A decoder whose feed-forwards are mixtures of ffn experts behind a router per layer (BTX, arXiv 2403.07816).

In BAM (arXiv 2408.08274) its attentions are mixtures too; with adapters these alone train, and routers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError
from megabts.model.attention import Context
from megabts.model.backend import Backend, Recompute
from megabts.model.decoder import Decoder
from megabts.model.part import Part
from megabts.moe.adapters import Adapters
from megabts.moe.attention import RoutedAttention
from megabts.moe.experts import FFNExperts
from megabts.moe.router import RouteObserver, Router, balance_loss, route, with_loss
from megabts.parallel.collectives import enter, leave
from megabts.parallel.mesh import Axis
from megabts.parallel.tensor import freeze


class RoutedFeedForward(nn.Module):
    """A router and N ffn experts; outputs are weighted sums. All tokens are routed alike on every tp rank."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, backend: Backend, recompute: Recompute, experts: Axis
    ) -> None:
        super().__init__()
        self.moe = moe
        self.tp, self.sequence = backend.tp, backend.sequence
        n, d = moe.num_ffn_experts, config.hidden_size
        stds = (config.init_std, config.init_std / (2 * config.num_layers) ** 0.5)
        self.router = Router(n, d, config.init_std, backend)
        adapters = Adapters(n, d, backend, experts) if moe.adapters else None
        width = moe.ffn_width(config.ffn_size)
        self.experts = FFNExperts(n, d, width, stds, backend, recompute, experts, adapters=adapters)
        if moe.freeze_ffn_experts:
            freeze(self.experts.parameters())
        self.observers: list[RouteObserver] = []

    def forward(self, hidden: Tensor, context: Context, layer: int) -> Tensor:
        """[s', b, D] -> the same."""
        hidden = enter(hidden, self.tp, self.sequence)
        s, b, _ = hidden.shape
        seeds = context.dropout_seeds if self.training else None
        logits = self.router(hidden)
        routes = route(logits, self.moe.routing_of(layer), self.moe.top_k, layer=layer, seeds=seeds, step=context.step)
        for observer in self.observers:
            observer(layer, routes)
        out = self.experts(hidden.flatten(0, 1), routes)
        if self.training and self.moe.balance > 0 and torch.is_grad_enabled():
            # The trainer divides by the tokens of the whole batch; each of the tp ranks adds its part.
            out = with_loss(out, balance_loss(routes, self.moe.balance), s * b / self.tp.size)
        return leave(out.view(s, b, -1), self.tp, self.sequence)


class MoEModel(Decoder):
    """A decoder with a `RoutedFeedForward` in every layer, with `moe.attention_experts` a `RoutedAttention` too.

    All its weights are its checkpoint's. A rank of the mesh axis `experts` holds its share of the ffn experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        backend: Backend,
        *,
        part: Part | None = None,
        recompute: Recompute = "none",
        experts: Axis | None = None,
    ) -> None:
        if moe.attention_experts and config.norm_position == "post":
            raise UsageError(
                "model.norm_position post does not go with attention experts (bam), whose outputs are mixed before "
                "they would be normed; upcycle with --method btx"
            )

        def after_norm(
            kind: Callable[[ModelConfig, MoEConfig, Backend, Recompute], nn.Module],
            model: ModelConfig,
            library: Backend,
            again: Recompute,
        ) -> tuple[nn.Module, nn.Module]:
            norm = library.norm(model.hidden_size, model.norm_eps, summed=library.sequence)
            return norm, kind(model, moe, library, again)

        super().__init__(
            config,
            backend,
            part=part,
            recompute=recompute,
            make_routed=partial(after_norm, partial(RoutedFeedForward, experts=experts or Axis("experts"))),
            make_attention=partial(after_norm, RoutedAttention) if moe.attention_experts else None,
        )
        self.moe = moe
        if moe.attention_experts:
            self.num_local_members = len(moe.members)
        if moe.adapters:
            freeze(self.parameters())
            for module in self.modules():
                if isinstance(module, Adapters | Router):
                    module.requires_grad_(True)

    @contextmanager
    def observe_routes(self, observer: RouteObserver, *, attention: bool = False) -> Iterator[None]:
        """Inside the block `observer(layer, routes)` is told of every pass through a layer here. Blocks may nest.

        Told are routes to ffn experts; with `attention` those to attention experts instead, where there are some.
        """
        kind = RoutedAttention if attention else RoutedFeedForward
        routed = [module for module in self.modules() if isinstance(module, kind)]
        for module in routed:
            module.observers.append(observer)
        try:
            yield
        finally:
            for module in routed:
                module.observers.remove(observer)
