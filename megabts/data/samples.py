"""From documents to fixed-length samples: the three index arrays of a GPT dataset, and the datasets that read by them.

A sample is `seq_length + 1` consecutive tokens of the epoch stream (all documents, shuffled and joined); neighbours
share one token, the last target of one being the first input of the next. Three arrays say where each sample lies:

- document `[epochs * num_documents]`: sequence numbers in reading order.
- sample `[num_samples + 1, 2]`: row i is (position in `document`, token offset) at which sample i begins.
- shuffle `[num_samples]`: the order in which samples are drawn.

They equal Megatron-LM's arrays (`GPTDataset`) number by number, from the same `numpy.random.RandomState` draws in the
same order, so a run can be continued with the data order it began with. The sample array comes from a closed form (one
cumulative sum and one binary search) in place of Megatron's C++ loop. As there, what is split and shuffled are the
*sequences* of the .idx file; with the usual one sequence per document these are the documents.

Limit: the arrays are held in memory while they are built, about 30 bytes per document and epoch.
"""

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megabts.data.index_cache import IndexCache, dataset_key
from megabts.data.indexed import IndexedDataset
from megabts.errors import UsageError, UserError

SPLITS = ("train", "valid", "test")


class Dataset(Protocol):
    """What a loader reads: samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`: int64 [seq_length + 1]."""
        ...

    def source(self, index: int) -> str:
        """Path prefix of the indexed dataset that sample `index` is read from."""
        ...


@dataclass(frozen=True)
class SampleIndices:
    """The index arrays of one dataset; shapes in the module's docstring."""

    document: np.ndarray
    sample: np.ndarray
    shuffle: np.ndarray


@dataclass(frozen=True)
class EpochPlan:
    """How often a dataset is read, which fixes the order of its samples."""

    epochs: int
    """Times every document is read."""
    separate_last: bool
    """The last epoch is shuffled by itself: less than 80 % of it is wanted, which would favour some documents."""
    num_samples: int
    """Samples in all epochs together; at least as many as were asked for."""
    num_first: int
    """Samples shuffled among themselves; the remaining ones (of a separate last epoch) follow, shuffled apart."""


def split_ranges(split: str, num_sequences: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Cut sequences into contiguous train, valid and test ranges by Megatron's split string, for example "969,30,1".

    Returns:
        Three (begin, end) pairs of sequence numbers; a part of zero width is (begin, begin).

    Raises:
        UsageError: the string does not hold one to three numbers with a positive sum.
    """
    try:
        shares = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= len(SPLITS) or sum(shares) <= 0 or "-" in split:
        raise UsageError(f"data.split is {split!r}; give train,valid,test shares such as 969,30,1")
    shares += [0.0] * (len(SPLITS) - len(shares))
    bounds = [0.0]
    for share in normalise(shares):
        bounds.append(bounds[-1] + share)
    ends = [round(bound * float(num_sequences)) for bound in bounds]
    return (ends[0], ends[1]), (ends[1], ends[2]), (ends[2], ends[3])


def normalise(values: list[float]) -> list[float]:
    """Values divided by their sum, in the double arithmetic of Megatron's function (the last bits decide ties)."""
    array = np.array(values, dtype=np.float64)
    return (array / np.sum(array)).tolist()


def plan_epochs(num_tokens: int, seq_length: int, num_samples: int | None) -> EpochPlan:
    """Epochs needed for `num_samples` samples out of `num_tokens` tokens per epoch; None: one epoch, whatever it gives.

    Raises:
        UserError: there is no token to read, or not even one sample.
    """
    if num_tokens <= 0:
        raise UserError("there are no tokens to read")
    if num_samples is None:
        epochs = 1
    else:
        epochs = max(1, -(-(num_samples * seq_length + 1) // num_tokens))
    total = (epochs * num_tokens - 1) // seq_length
    if total < 1:
        raise UserError(f"{num_tokens} tokens do not fill one sample of {seq_length} + 1 tokens")
    if epochs == 1 or num_samples is None:
        return EpochPlan(epochs, False, total, total)
    without_last = ((epochs - 1) * num_tokens - 1) // seq_length
    from_last = num_samples - without_last
    per_epoch = (num_tokens - 1) // seq_length
    separate = from_last < int(0.80 * per_epoch)
    return EpochPlan(epochs, separate, total, without_last if separate else total)


def document_index(indices: np.ndarray, plan: EpochPlan, rng: np.random.RandomState) -> np.ndarray:
    """Reading order of the sequences: int32 [epochs * len(indices)]."""
    if not plan.separate_last:
        order = np.tile(indices.astype(np.int32), plan.epochs)
        rng.shuffle(order)
        return order
    first = np.tile(indices.astype(np.int32), plan.epochs - 1)
    rng.shuffle(first)
    last = indices.astype(np.int32)
    rng.shuffle(last)
    return np.concatenate([first, last])


def sample_index(lengths: np.ndarray, document: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """Where samples begin: [num_samples + 1, 2] rows (position in `document`, token offset), int32 or, if needed,
    int64.

    A sample that ends exactly with a document leaves the next one to begin at that document's last token, since
    neighbouring samples share a token. Documents without tokens are never begun at.
    """
    read = lengths[document]
    ends = np.zeros(len(document) + 1, dtype=np.int64)
    np.cumsum(read, out=ends[1:])
    starts = np.arange(1, num_samples + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, starts + 1, side="left") - 1
    largest = max(len(document), int(read.max(initial=0)))
    rows = np.zeros((num_samples + 1, 2), dtype=np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    rows[1:, 0] = positions
    rows[1:, 1] = starts - ends[positions]
    return rows


def shuffle_index(plan: EpochPlan, rng: np.random.RandomState) -> np.ndarray:
    """Order in which samples are drawn: uint32 [plan.num_samples], int64 from 2^32 - 2 samples on."""
    dtype = np.uint32 if plan.num_samples < np.iinfo(np.uint32).max - 1 else np.int64
    first = np.arange(plan.num_first, dtype=dtype)
    rng.shuffle(first)
    if plan.num_first == plan.num_samples:
        return first
    last = np.arange(plan.num_first, plan.num_samples, dtype=dtype)
    rng.shuffle(last)
    return np.concatenate([first, last])


def build_sample_indices(
    lengths: np.ndarray, indices: np.ndarray, seq_length: int, num_samples: int | None, seed: int
) -> SampleIndices:
    """The three index arrays for the sequences `indices` of a dataset with sequence `lengths`.

    Args:
        lengths: tokens of every sequence of the file, int32 [S].
        indices: sequence numbers to read, in order, int32 [n].
        seq_length: tokens per sample, the shared target token not counted.
        num_samples: samples wanted; documents are read as often as that takes. None: one epoch.
        seed: seed of the document shuffle and, continuing the same stream, of the sample shuffle.

    Raises:
        UserError: there are no tokens, or not even one sample.
    """
    plan = plan_epochs(int(lengths[indices].sum(dtype=np.int64)), seq_length, num_samples)
    rng = np.random.RandomState(seed)
    document = document_index(indices, plan, rng)
    shuffle = shuffle_index(plan, rng)
    return SampleIndices(document, sample_index(lengths, document, seq_length, plan.num_samples), shuffle)


class SampleDataset:
    """Shuffled samples of one indexed dataset, or of one split of it, over as many epochs as `num_samples` takes.

    Args:
        indexed: where tokens are read from.
        begin, end: range of its sequences (`split_ranges`).
        num_samples: samples wanted; the dataset may hold a few more. None: one epoch.
        seq_length: tokens per sample; samples are one longer.
        seed: seed of the shuffles.
        cache_dir: folder to keep the index arrays in; None: they are built anew.

    Raises:
        UserError: the range is empty, or one epoch of it does not fill a single sample.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        begin: int,
        end: int,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        cache_dir: str | None = None,
    ) -> None:
        self.indexed = indexed
        self.seq_length = seq_length
        num_tokens = count_tokens(indexed, begin, end, seq_length)
        plan = plan_epochs(num_tokens, seq_length, num_samples)

        def build() -> dict[str, np.ndarray]:
            numbers = np.arange(begin, end, dtype=np.int32)
            return vars(build_sample_indices(indexed.lengths, numbers, seq_length, num_samples, seed))

        if cache_dir:
            shapes = {
                "document": (plan.epochs * (end - begin),),
                "sample": (plan.num_samples + 1, 2),
                "shuffle": (plan.num_samples,),
            }
            key = dataset_key(indexed.prefix, [begin, end, num_samples, seq_length, seed])
            self.indices = SampleIndices(**IndexCache(cache_dir).get(key, shapes, build))
        else:
            self.indices = SampleIndices(**build())

    def __len__(self) -> int:
        return len(self.indices.shuffle)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` in shuffled order: int64 [seq_length + 1]."""
        return read_sample(self.indexed, self.indices, index)

    def source(self, index: int) -> str:
        """Path prefix of the dataset read from."""
        return self.indexed.prefix


def read_sample(indexed: IndexedDataset, indices: SampleIndices, index: int) -> np.ndarray:
    """Tokens of drawn sample `index`, joined across documents: int64 [seq_length + 1]."""
    row = int(indices.shuffle[index])
    (first, begin), (last, end) = indices.sample[row].tolist(), indices.sample[row + 1].tolist()
    if first == last:
        return indexed.get(int(indices.document[first]), begin, end - begin + 1).astype(np.int64)
    parts = [indexed.get(int(indices.document[first]), begin)]
    parts += [indexed.get(int(number)) for number in indices.document[first + 1 : last]]
    parts.append(indexed.get(int(indices.document[last]), 0, end + 1))
    return np.concatenate(parts).astype(np.int64)


def count_tokens(indexed: IndexedDataset, begin: int, end: int, seq_length: int) -> int:
    """Tokens in sequences [begin, end); a `UserError` when they do not fill one sample."""
    if end <= begin:
        raise UserError(
            f"{indexed.prefix}: this split holds none of the file's {len(indexed)} sequences; "
            "change data.split or add data"
        )
    num_tokens = int(indexed.lengths[begin:end].sum(dtype=np.int64))
    if num_tokens < seq_length + 1:
        raise UserError(
            f"{indexed.prefix}: sequences {begin} to {end} hold {num_tokens} tokens, too few for one sample of "
            f"data.seq_length + 1 = {seq_length + 1} tokens"
        )
    return num_tokens
