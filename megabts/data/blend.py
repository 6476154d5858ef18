"""Several datasets drawn in fixed proportions: which dataset gives sample i, and which of its own samples.

The greedy rule of Megatron-LM: sample i comes from the dataset that lags furthest behind its share,

    argmax_j  weight_j * max(i, 1) - count_j        (first wins ties; double arithmetic)

so that every prefix of the blend holds each dataset within one sample of its share. The rule is sequential, and a
plain loop takes about a microsecond per sample and dataset. `blend_index` gets the same numbers some 30 times faster:
the range is cut into lanes that are run side by side as vectors, each from a guess of the counts at its beginning.
Where a lane did begin with the counts its predecessor ended with, its choices are those of the loop, for nothing else
enters them; where not, it is run again from there. Guesses need not be good for the result to be exact, only for it to
be fast: the shares rounded to whole samples are nearly always in the loop's course within a few steps.
"""

import math
from collections.abc import Sequence

import numpy as np

from megabts.data.samples import Dataset, normalise
from megabts.errors import UsageError, UserError

MAX_DATASETS = 32766
"""Dataset numbers are int16, and Megatron keeps the last one back."""

_ROUNDS = 8
"""Vectorised repairs before the lanes still wrong are run one by one."""


def blend_loop(weights: Sequence[float], counts: list[float], begin: int, end: int) -> tuple[np.ndarray, list[float]]:
    """The rule as it reads, for samples [begin, end) after `counts` samples were drawn; the oracle of `blend_index`.

    Returns:
        The datasets chosen, int16 [end - begin], and the counts afterwards.
    """
    counts = list(counts)
    choices = np.empty(end - begin, dtype=np.int16)
    for i in range(begin, end):
        target = max(float(i), 1.0)
        lags = [weight * target - count for weight, count in zip(weights, counts, strict=True)]
        choice = lags.index(max(lags))
        counts[choice] += 1.0
        choices[i - begin] = choice
    return choices, counts


def blend_index(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Dataset of each of `size` samples, int16 [size], and the sample's number in that dataset, int64 [size].

    Weights are used as given; they should add up to 1.
    """
    choices = _choose(np.array(weights, dtype=np.float64), size)
    order = np.argsort(choices, kind="stable")
    counts = np.bincount(choices, minlength=len(weights))
    numbers = np.empty(size, dtype=np.int64)
    numbers[order] = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
    return choices, numbers


def _choose(weights: np.ndarray, size: int) -> np.ndarray:
    """The rule's choices for samples [0, size), int16."""
    steps = max(math.isqrt(size), 1)
    begins = np.arange(0, max(size, 1), steps)
    starts = _guess_counts(weights, begins)
    choices, ends = _run_lanes(weights, starts, begins, steps)
    for _ in range(_ROUNDS):
        wrong = 1 + np.flatnonzero((ends[:-1] != starts[1:]).any(axis=1))
        if not len(wrong):
            break
        starts[wrong] = ends[wrong - 1]
        choices[:, wrong], ends[wrong] = _run_lanes(weights, starts[wrong], begins[wrong], steps)
    for lane in range(1, len(begins)):
        if (ends[lane - 1] != starts[lane]).any():
            begin = int(begins[lane])
            starts[lane] = ends[lane - 1]
            choices[:, lane], ends[lane] = blend_loop(weights.tolist(), starts[lane].tolist(), begin, begin + steps)
    return choices.T.reshape(-1)[:size]


def _guess_counts(weights: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Samples drawn before each of `begins`, [lanes, datasets]: shares rounded by largest remainder."""
    shares = np.outer(begins, weights)
    counts = np.floor(shares)
    rank = np.argsort(np.argsort(counts - shares, axis=1, kind="stable"), axis=1, kind="stable")
    missing = begins - counts.sum(axis=1)
    return counts + (rank < missing[:, None])


def _run_lanes(
    weights: np.ndarray, starts: np.ndarray, begins: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """`steps` choices of every lane, int16 [steps, lanes], and the counts after them, [lanes, datasets]."""
    counts = starts.copy()
    flat_counts = counts.reshape(-1)
    first = np.arange(len(begins)) * len(weights)
    choices = np.empty((steps, len(begins)), dtype=np.int16)
    lags = np.empty_like(counts)
    for step in range(steps):
        target = np.maximum(begins + step, 1).astype(np.float64)
        np.multiply(target[:, None], weights, out=lags)
        lags -= counts
        choice = lags.argmax(axis=1)
        choices[step] = choice
        flat_counts[first + choice] += 1.0
    return choices, counts


class BlendedDataset:
    """`size` samples drawn from `datasets` in proportion to `weights`, each dataset's own samples in order.

    Args:
        datasets: what is blended.
        weights: one share per dataset; normalised here.
        size: samples in the blend.

    Raises:
        UsageError: no datasets or too many, weights that are no shares.
        UserError: the blend draws more samples from a dataset than it holds.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], size: int) -> None:
        check_weights(weights, len(datasets))
        self.datasets = list(datasets)
        self.dataset_index, self.dataset_sample_index = blend_index(normalise(list(weights)), size)
        drawn = np.bincount(self.dataset_index, minlength=len(datasets))
        for dataset, count in zip(self.datasets, drawn.tolist(), strict=True):
            if count > len(dataset):
                where = dataset.source(0) if len(dataset) else "an empty dataset"
                raise UserError(f"the blend draws {count} samples from {where}, which was built with {len(dataset)}")

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` of the blend: int64 [seq_length + 1]."""
        return self.datasets[self.dataset_index[index]][int(self.dataset_sample_index[index])]

    def source(self, index: int) -> str:
        """Path prefix of the dataset that sample `index` comes from."""
        return self.datasets[self.dataset_index[index]].source(int(self.dataset_sample_index[index]))


def check_weights(weights: Sequence[float], num_datasets: int) -> None:
    """Refuse weights that are no shares of `num_datasets` datasets."""
    if not 1 <= num_datasets <= MAX_DATASETS:
        raise UsageError(f"cannot blend {num_datasets} datasets; give 1 to {MAX_DATASETS}, merging some if need be")
    if len(weights) != num_datasets:
        raise UsageError(f"{len(weights)} weights for {num_datasets} datasets; give one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        shown = ", ".join(f"{weight:g}" for weight in weights[:8])
        raise UsageError(f"dataset weights {shown}: they must be finite, not negative, and not all 0")
