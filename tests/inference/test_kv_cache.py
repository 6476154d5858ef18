"""The cache gives back what went in, row by row, and its size is known beforehand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megabts.config.model import ModelConfig
from megabts.inference.kv_cache import WIDTHS, Decode, KVCache, Prefill, Stretches, bucket, cache_bytes

CONFIG = ModelConfig(num_layers=3, num_heads=4, num_kv_heads=2, hidden_size=32)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "starts, viewed",
    [([0], True), ([10], True), ([3, 10], True), ([3, 10, 17], True), ([10, 3], False), ([0, 8, 14], False)],
)
def test_gives_back_all_so_far(starts: list[int], viewed: bool) -> None:
    cache = KVCache.empty(CONFIG, 1, 24, torch.float32, CPU)
    cache.stored.normal_()  # what others left there
    prompts = [5, 2, 3][: len(starts)]
    keys, values = torch.randn(3, 7, len(starts), 2, 8), torch.randn(3, 7, len(starts), 2, 8)  # of each row's last 7
    cache.places = Prefill(list(zip(starts, prompts, strict=True)))
    for layer in (2, 0, 1):  # order of layers does not matter
        assert cache.append(layer, keys[layer, :5], values[layer, :5])[1] is not values
    for step in (1, 2):
        lengths = [prompt + step for prompt in prompts]
        cache.places = places = Decode.of(starts, lengths, 24, CPU)
        assert (places.index is None) == viewed
        for layer in range(3):
            key, value = cache.append(layer, keys[layer, 4 + step : 5 + step], values[layer, 4 + step : 5 + step])
            for row, length in enumerate(lengths):
                assert torch.equal(key[:length, row], keys[layer, 5 + step - length : 5 + step, row])
                assert torch.equal(value[:length, row], values[layer, 5 + step - length : 5 + step, row])
    if len(starts) > 2:
        some = cache.of_rows(torch.tensor([0, 2])).places
        assert isinstance(some, Decode)
        found = some.store(cache.stored[1], keys[1, 6:7, [0, 2]], values[1, 6:7, [0, 2]])
        assert torch.equal(found[0][:5, 1], keys[1, 2:7, 2])
        assert torch.equal(found[1][:7, 0], values[1, :7, 0])
        one = cache.of_rows(torch.tensor([1])).places.store(cache.stored[1], keys[1, 6:7, 1:2], values[1, 6:7, 1:2])
        assert torch.equal(one[0][:4, 0], keys[1, 3:7, 1])


def test_a_view_does_not_copy_and_ends_with_the_buffer() -> None:
    stored = torch.zeros(2, 2, 20, 8)
    new = torch.ones(1, 2, 2, 8)
    key, _ = Decode.of([2, 10], [8, 3], 20, CPU).store(stored, new, new)
    assert key.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    key, _ = Decode.of([2, 14], [8, 3], 20, CPU).store(stored, new, new)  # 14 + 8 columns would end beyond it
    assert key.shape == (8, 2, 2, 8)
    assert key.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "starts, room, expected",
    [
        ([0], 2000, (512, 1, 0)),
        ([7], 507, (500, 1, 7)),  # where so many tokens are not there
        ([7, 1000, 1993], 3000, (512, 993, 7)),
        ([7, 600], 920, (512, None, 0)),  # the first has more tokens than the last has room for: no view
        ([7, 1000, 1994], 3000, (512, None, 0)),
        ([1000, 7], 3000, (512, None, 0)),
    ],
)
def test_numbers_stay_the_same_for_many_steps(
    starts: list[int], room: int, expected: tuple[int, int | None, int]
) -> None:
    """A row of 300 to 500 tokens beside shorter ones; they are those of a view exactly where rows can be viewed."""
    others = [9] * (len(starts) - 1)
    found = {bucket(starts, [length, *others], room) for length in (330, 400, 500)}
    assert found == {expected}
    assert (Decode.of(starts, [330, *others], room, CPU).index is None) == (expected[1] is not None)
    assert bucket(starts[:1], [WIDTHS], 3000)[0] == WIDTHS


def test_size_is_known_beforehand() -> None:
    held = KVCache.empty(CONFIG, 1, 55, torch.bfloat16, CPU).stored.untyped_storage().nbytes()
    assert cache_bytes(CONFIG, 1, 55, torch.bfloat16) == held == 3 * 2 * 55 * 2 * 8 * 2
    assert cache_bytes(CONFIG, 2, 55, torch.bfloat16) == held // 2
    assert cache_bytes(CONFIG, 4, 55, torch.bfloat16) == held // 2  # two key heads among four ranks


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40))
def test_stretches_do_not_overlap_and_nothing_is_lost(moves: list[tuple[bool, int]]) -> None:
    """Against a list of single tokens."""
    stretches, owners = Stretches(20), [0] * 20
    held: list[tuple[int, int]] = []
    for number, (takes, size) in enumerate(moves, 1):
        if takes:
            fits = [start for start in range(21 - size) if not any(owners[start : start + size])]
            start = stretches.take(size)
            assert start == (fits[0] if fits else None)
            if start is not None:
                owners[start : start + size] = [number] * size
                held.append((start, size))
        elif held:
            start, length = held.pop(size % len(held))
            stretches.give(start, length)
            owners[start : start + length] = [0] * length
    for start, length in held:
        stretches.give(start, length)
    assert stretches.take(20) == 0
