"""Keys and values of the tokens so far, so that a decode step computes one token instead of all of them.

Everything is allocated once, at the capacity known before the first token: memory cannot run out half way, and no
step copies what is there. Stored heads first, [layers, 2, b, kv_heads, capacity, hd]: attention reads one head's keys
over all positions, which are then neighbours in memory. A BTS model needs one cache per member, BAM one
per attention expert: each has its own keys.
"""

import torch
from torch import Tensor

from megabts.config.model import ModelConfig


class KVCache:
    """One member's keys and values: a `LayerCache`. Layers append at `position`; only the owner advances it."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.capacity = capacity
        self.position = 0
        shape = _shape(config, batch, capacity)
        self._stored = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [s, b, kv_heads, hd] at the position; returns views [position + s, b, kv_heads, hd] of all so far."""
        end = self.position + key.shape[0]
        assert end <= self.capacity, f"cache of {self.capacity} tokens is asked to hold {end}"
        stored = self._stored[layer, :, :, :, :end].permute(0, 3, 1, 2, 4)  # [2, end, b, kv_heads, hd]
        stored[0, self.position :].copy_(key)
        stored[1, self.position :].copy_(value)
        return stored[0], stored[1]

    def advance(self, num_tokens: int) -> None:
        """Move on, after all layers have appended these tokens."""
        assert self.position + num_tokens <= self.capacity
        self.position += num_tokens


def cache_bytes(config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype) -> int:
    """Memory of one member's cache, bytes, without allocating it."""
    return torch.Size(_shape(config, batch, capacity)).numel() * dtype.itemsize


def _shape(config: ModelConfig, batch: int, capacity: int) -> tuple[int, ...]:
    return (config.num_layers, 2, batch, config.num_kv_heads, capacity, config.head_dim)
