"""Grouped-query self-attention with rotary positions; multi-head and multi-query are its ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabts.config.model import ModelConfig
from megabts.model.backend import Backend, Recompute
from megabts.model.rope import rotate, rotate_heads, rotation
from megabts.parallel.sharding import ParamMeta


class LayerCache(Protocol):
    """Keys and values of earlier positions, per layer."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [s, b, kv_heads, hd] after what is there; returns all so far. The owner moves the position on."""
        ...

    def of_rows(self, rows: Tensor) -> "LayerCache":
        """For these rows [r] of the batch alone."""
        ...


@dataclass(frozen=True)
class Context:
    """What all layers (and members) of one forward pass share."""

    rope: tuple[Tensor, Tensor]
    """cos and sin of the positions' angles."""
    mask: Tensor | None = None
    """Where attention is allowed: bool [b, 1, s, t]; None is plain causal."""
    dropout_seeds: Sequence[int] | None = None
    """Seed of each sample's random numbers (dropout masks, routers' noise); None: none (evaluation)."""
    tokens: Tensor | None = None
    """What the positions read, [b, s]; there where logits are asked for."""
    starts: Tensor | None = None
    """Where a text starts, bool [b, s]: one that nothing before it tells of. None: at the first of all positions."""
    prompt_length: int | None = None
    """How many of the first positions are a prompt; None: the text is a window, which has none."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What a model of several members knows of the texts so far, each tensor with b first. A generation hands it from
    one forward pass to the next; rows may come and go between them."""
    step: int = 0
    """Training steps done: the temperature of sampled routing falls with them."""

    def of_rows(self, rows: Tensor) -> "Context":
        """For these rows [r] of the batch alone, with an empty memory."""
        cos, sin = (part if part.shape[1] == 1 else part[:, rows] for part in self.rope)
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows]
        seeds = self.dropout_seeds and [self.dropout_seeds[row] for row in rows.tolist()]
        tokens, starts = (part if part is None else part[rows] for part in (self.tokens, self.starts))
        return replace(self, rope=(cos, sin), mask=mask, dropout_seeds=seeds, tokens=tokens, starts=starts, memory={})


def make_context(
    config: ModelConfig,
    positions: Tensor,
    dtype: torch.dtype,
    *,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    dropout_seeds: Sequence[int] | None = None,
    tokens: Tensor | None = None,
    prompt_length: int | None = None,
    step: int = 0,
) -> Context:
    """Context for tokens at `positions` ([s], or [s, b] when they differ over the batch).

    document_ids [b, s] keeps each packed document to itself where `config.cross_document_attention` is false.
    """
    starts = None
    if document_ids is not None and not config.cross_document_attention:
        same = document_ids.unsqueeze(1) == document_ids.unsqueeze(2)
        mask = same.tril().unsqueeze(1)
        starts = document_ids.diff(dim=1, prepend=document_ids[:, :1] - 1) != 0
    return Context(rotation(config, positions, dtype), mask, dropout_seeds, tokens, starts, prompt_length, step=step)


def qkv_metas(config: ModelConfig) -> tuple[ParamMeta, ParamMeta | None]:
    """Weight [(q + k + v heads) hd, D] and bias, if there is one, of the fused query-key-value projection."""
    rows = sum(config.qkv_heads) * config.head_dim
    split = {"dim": 0, "parts": config.qkv_heads, "unit": config.head_dim}
    weight = ParamMeta((rows, config.hidden_size), "normal", config.init_std, **split)  # type: ignore[arg-type]
    bias = ParamMeta((rows,), "constant", **split) if config.qkv_bias else None  # type: ignore[arg-type]
    return weight, bias


class Attention(nn.Module):
    """softmax(q k^T / sqrt(hd)) v; `qkv` is the projection of hidden states to heads, of `qkv_metas`.

    `left`: the output is this rank's part of a sum over tp, at all s positions (see `Backend.row_linear`).
    """

    def __init__(
        self, config: ModelConfig, backend: Backend, qkv: nn.Module, recompute: Recompute, *, left: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.local_heads = [max(1, heads // backend.tp.size) for heads in config.qkv_heads]
        self.backend = backend
        self.recompute = recompute
        self.qkv = qkv
        self.full_norm = config.qk_norm and config.qk_norm_span == "full"
        if self.full_norm:
            self.q_norm, self.k_norm = (
                backend.split_norm(
                    ParamMeta((heads * config.head_dim,), "constant", 1.0, 0, parts=(heads,), unit=config.head_dim),
                    config.norm_eps,
                )
                for heads in config.qkv_heads[:2]
            )
        elif config.qk_norm:  # a rank sees its own heads: its weight gradient is a part
            self.q_norm = backend.norm(config.head_dim, config.norm_eps, summed=True)
            self.k_norm = backend.norm(config.head_dim, config.norm_eps, summed=True)
        out_std = config.init_std / (2 * config.num_layers) ** 0.5
        shape = (config.hidden_size, config.num_heads * config.head_dim)
        self.out = backend.row_linear(
            ParamMeta(shape, "normal", out_std, dim=1, parts=(config.num_heads,), unit=config.head_dim), left=left
        )
        self.qk_norm = config.qk_norm

    def forward(self, hidden: Tensor, context: Context, layer: int, cache: LayerCache | None = None) -> Tensor:
        """[s or s / tp, b, D] -> the same; in between every rank has its heads at all s positions."""
        qkv = self.qkv(hidden)  # [s, b, (q + k + v heads) hd / tp]
        if self.recompute == "selective" and torch.is_grad_enabled():
            mixed = checkpoint(self._core, qkv, context, layer, cache, use_reentrant=False)
        else:
            mixed = self._core(qkv, context, layer, cache)
        out: Tensor = self.out(mixed)
        return out

    def _core(self, qkv: Tensor, context: Context, layer: int, cache: LayerCache | None) -> Tensor:
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        num_query, num_key, num_value = self.local_heads
        if self.qk_norm:
            query, key, value = heads.split([num_query, num_key, num_value], 2)
            query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
            query, key = (rotate(part, context.rope, self.backend.fuse) for part in (query, key))
        else:  # one rotation for queries and keys together
            query, key, value = rotate_heads(heads, context.rope, num_query, num_key, self.backend.fuse)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return self.backend.attention(query, key, value, context.mask)

    def _normed(self, norm: nn.Module, heads: Tensor) -> Tensor:
        """[s, b, heads, hd] -> the same, normed head by head or all heads of a position together."""
        out: Tensor = norm(heads.flatten(2)).view(heads.shape) if self.full_norm else norm(heads)
        return out
