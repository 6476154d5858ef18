"""One Transformer layer: attention and a SwiGLU feed-forward, each after a norm and added to the residual stream."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabts.config.model import ModelConfig
from megabts.model.attention import Attention, Context, LayerCache, Recompute
from megabts.model.backend import Backend
from megabts.parallel.sharding import ParamMeta


class MLP(nn.Module):
    """down(silu(gate x) * up x) with gate and up in one matrix (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, backend: Backend, recompute: Recompute) -> None:
        super().__init__()
        d, f = config.hidden_size, config.ffn_size
        self.backend = backend
        self.recompute = recompute
        self.gate_up = backend.column_linear(ParamMeta((2 * f, d), "normal", config.init_std, dim=0, parts=(f, f)))
        out_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.down = backend.row_linear(ParamMeta((d, f), "normal", out_std, dim=1))

    def forward(self, hidden: Tensor) -> Tensor:
        """[s, b, D] -> [s, b, D]."""
        gate_up = self.gate_up(hidden)
        if self.recompute == "selective" and torch.is_grad_enabled():
            activated = checkpoint(self.backend.swiglu, gate_up, use_reentrant=False)
        else:
            activated = self.backend.swiglu(gate_up)
        out: Tensor = self.down(activated)
        return out


class Layer(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: ModelConfig, backend: Backend, recompute: Recompute) -> None:
        super().__init__()
        self.attention_norm = backend.norm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, backend, recompute)
        self.mlp_norm = backend.norm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, backend, recompute)
        self.recompute = recompute

    def forward(self, hidden: Tensor, context: Context, layer: int, cache: LayerCache | None = None) -> Tensor:
        """[s, b, D] -> [s, b, D]."""
        if self.recompute == "full" and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._forward, hidden, context, layer, cache, use_reentrant=False)
            return out
        return self._forward(hidden, context, layer, cache)

    def _forward(self, hidden: Tensor, context: Context, layer: int, cache: LayerCache | None) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), context, layer, cache)
        return hidden + self.mlp(self.mlp_norm(hidden))
