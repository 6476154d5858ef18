"""One Transformer layer: attention and a SwiGLU feed-forward, each with a norm and added to the residual stream."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megabts.config.model import ModelConfig
from megabts.model.attention import Attention, Context, LayerCache, qkv_metas
from megabts.model.backend import Backend, Recompute
from megabts.parallel.sharding import ParamMeta

MakeRouted = Callable[[ModelConfig, Backend, Recompute], tuple[nn.Module, nn.Module]]
"""Makes (norm, what reads it): a feed-forward that is called with (hidden, context, layer), not with hidden alone; or
attention, called with (hidden, context, layer, caches)."""
Caches = LayerCache | Sequence[LayerCache] | None
"""An attention's cache; of several attentions in a layer, each one's."""


class Layer(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); with `norm_position` post h + norm(attention(h)), and so on.

    `make_routed` puts a routed feed-forward in the MLP's place, `make_attention` several attentions in the one's.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        recompute: Recompute,
        make_routed: MakeRouted | None = None,
        make_attention: MakeRouted | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        d, f = config.hidden_size, config.ffn_size
        self.attention_norm: nn.Module
        self.attention: nn.Module
        self.post = config.norm_position == "post"
        if make_attention is not None:
            assert not self.post, "several attentions read normed states"
            self.attention_norm, self.attention = make_attention(config, backend, recompute)
        elif self.post:
            self.attention_norm = backend.norm(d, config.norm_eps, summed=backend.sequence)
            self.attention = Attention(config, backend, backend.column_linear(*qkv_metas(config)), recompute)
        else:
            self.attention_norm, qkv = backend.norm_linear(d, config.norm_eps, *qkv_metas(config))
            self.attention = Attention(config, backend, qkv, recompute)
        self.routed = make_routed is not None
        if make_routed is not None:
            self.mlp_norm, self.mlp = make_routed(config, backend, recompute)
        else:
            gate_up = ParamMeta((2 * f, d), "normal", config.init_std, dim=0, parts=(f, f))
            down = ParamMeta((d, f), "normal", config.init_std / (2 * config.num_layers) ** 0.5, dim=1)
            if self.post:
                self.mlp_norm = backend.norm(d, config.norm_eps, summed=backend.sequence)
                self.mlp = backend.mlp(gate_up, down, recompute)
            else:
                self.mlp_norm, self.mlp = backend.norm_mlp(d, config.norm_eps, gate_up, down, recompute)
        self.recompute = recompute

    def forward(self, hidden: Tensor, context: Context, layer: int, cache: Caches = None) -> Tensor:
        """[s or s / tp, b, D] -> the same."""
        if self.recompute == "full" and torch.is_grad_enabled():
            return self.backend.checkpoint(self._forward, hidden, context, layer, cache)
        return self._forward(hidden, context, layer, cache)

    def _forward(self, hidden: Tensor, context: Context, layer: int, cache: Caches) -> Tensor:
        if self.post:
            hidden = hidden + self.attention_norm(self.attention(hidden, context, layer, cache))
            return hidden + self.mlp_norm(self._feed_forward(hidden, context, layer))
        hidden = hidden + self.attention(self.attention_norm(hidden), context, layer, cache)
        return hidden + self._feed_forward(self.mlp_norm(hidden), context, layer)

    def _feed_forward(self, hidden: Tensor, context: Context, layer: int) -> Tensor:
        out: Tensor = self.mlp(hidden, context, layer) if self.routed else self.mlp(hidden)
        return out
