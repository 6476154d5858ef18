"""The cache gives back what went in, in order, and its size is known beforehand."""

import pytest
import torch

from megabts.config.model import ModelConfig
from megabts.inference.kv_cache import KVCache, cache_bytes

CONFIG = ModelConfig(num_layers=3, num_heads=4, num_kv_heads=2, hidden_size=32)


def test_gives_back_all_so_far() -> None:
    cache = KVCache(CONFIG, 2, 7, torch.float32, "cpu")
    keys, values = torch.randn(3, 7, 2, 2, 8), torch.randn(3, 7, 2, 2, 8)
    for start, end in [(0, 4), (4, 5), (5, 7)]:
        for layer in (2, 0, 1):  # order of layers does not matter
            key, value = cache.append(layer, keys[layer, start:end], values[layer, start:end])
            assert torch.equal(key, keys[layer, :end])
            assert torch.equal(value, values[layer, :end])
        assert cache.position == start
        cache.advance(end - start)
    with pytest.raises(AssertionError, match="7 tokens is asked to hold 8"):
        cache.append(0, keys[0, :1], values[0, :1])


def test_size_is_known_beforehand() -> None:
    cache = KVCache(CONFIG, 5, 11, torch.bfloat16, "cpu")
    held = sum(tensor.untyped_storage().nbytes() for tensor in vars(cache).values() if isinstance(tensor, torch.Tensor))
    assert cache_bytes(CONFIG, 5, 11, torch.bfloat16) == held == 3 * 2 * 11 * 5 * 2 * 8 * 2
