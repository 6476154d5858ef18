"""The vectorised blend against the plain loop of the rule, and against Megatron's numbers."""

import numpy as np
import pytest

from megabts.data import blend
from megabts.data.blend import BlendedDataset, blend_index, blend_loop
from megabts.errors import UsageError, UserError


class Numbers:
    """A dataset whose sample i is [name, i]."""

    def __init__(self, name: int, size: int) -> None:
        self.name = name
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self.name, index])

    def source(self, index: int) -> str:
        return f"set{self.name}"


def plain(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    """The rule written out once more, without numpy."""
    counts = [0] * len(weights)
    chosen, numbers = [], []
    for i in range(size):
        best, best_lag = 0, float("-inf")
        for j, weight in enumerate(weights):
            lag = weight * max(float(i), 1.0) - float(counts[j])
            if lag > best_lag:
                best, best_lag = j, lag
        chosen.append(best)
        numbers.append(counts[best])
        counts[best] += 1
    return chosen, numbers


def random_weights(case: int) -> list[float]:
    rng = np.random.default_rng(case)
    count = int(rng.integers(1, 9))
    kind = case % 8
    values: np.ndarray
    if kind == 0:
        values = np.ones(count)
    elif kind == 1:
        values = rng.integers(1, 10, count).astype(float)
    elif kind == 2:
        values = np.where(rng.random(count) < 0.5, 0.0, rng.random(count))
        values[rng.integers(count)] = 1.0
    elif kind == 3:
        values = rng.random(count) ** 12 + 1e-12
    elif kind == 4:
        values = rng.choice([0.1, 0.2, 0.3], count)
    elif kind == 5:
        values = 10.0 ** -rng.integers(0, 10, count)
    else:
        values = rng.dirichlet(np.full(count, 0.1 if kind == 6 else 1.0)) + 1e-300
    return (values / values.sum()).tolist()


def test_golden() -> None:
    chosen, numbers = blend_index([0.5, 0.3, 0.2], 20)
    assert chosen.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert (chosen.dtype, numbers.dtype) == (np.int16, np.int64)


@pytest.mark.parametrize("first", range(0, 320, 40))
def test_equals_the_loop(first: int) -> None:
    for case in range(first, first + 40):
        weights = random_weights(case)
        size = int(np.random.default_rng(case).integers(1, 6000))
        chosen, numbers = blend_index(weights, size)
        want_chosen, want_numbers = plain(weights, size)
        assert chosen.tolist() == want_chosen, weights
        assert numbers.tolist() == want_numbers, weights


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1e-9, 0.3, 0.2, 0.5 - 1e-9], [0.1, 0.1, 0.05, 0.75], [0.0, 1.0]])
def test_equals_the_loop_far_out(weights: list[float]) -> None:
    size = 150_000
    np.testing.assert_array_equal(blend_index(weights, size)[0], blend_loop(weights, [0.0] * len(weights), 0, size)[0])


def test_exact_from_any_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(6)
    want = plain(weights, 3000)[0]
    monkeypatch.setattr(
        blend, "_guess_counts", lambda weights, begins: np.outer(begins, weights == weights.max()) * 0.0
    )
    assert blend_index(weights, 3000)[0].tolist() == want
    monkeypatch.setattr(blend, "_ROUNDS", 0)
    assert blend_index(weights, 3000)[0].tolist() == want


def test_prefix_holds_every_share_within_one_sample() -> None:
    weights = [0.55, 0.25, 0.15, 0.05]
    chosen = blend_index(weights, 5000)[0]
    counts = np.cumsum(chosen[:, None] == np.arange(4), axis=0)
    shares = np.arange(1, 5001)[:, None] * np.array(weights)
    assert np.abs(counts - shares).max() <= 1.0


def test_blended_dataset_reads_each_dataset_in_order() -> None:
    blended = BlendedDataset([Numbers(0, 60), Numbers(1, 40)], [6, 4], 100)
    assert len(blended) == 100
    samples = [tuple(blended[i].tolist()) for i in range(100)]
    assert [number for name, number in samples if name == 0] == list(range(60))
    assert [number for name, number in samples if name == 1] == list(range(40))
    assert [blended.source(i) for i in range(100)] == [f"set{name}" for name, _ in samples]


def test_refusals() -> None:
    with pytest.raises(UserError, match="draws 60 samples from set0, which was built with 59"):
        BlendedDataset([Numbers(0, 59), Numbers(1, 40)], [0.6, 0.4], 100)
    with pytest.raises(UsageError, match="cannot blend 0"):
        BlendedDataset([], [], 10)
    with pytest.raises(UsageError, match="1 weights for 2"):
        BlendedDataset([Numbers(0, 9), Numbers(1, 9)], [1.0], 5)
    for weights in ([0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(UsageError, match="dataset weights"):
            BlendedDataset([Numbers(0, 9), Numbers(1, 9)], weights, 5)
    with pytest.raises(UsageError, match="cannot blend 32767 datasets"):
        BlendedDataset([Numbers(0, 1)] * 32767, [1.0] * 32767, 5)
