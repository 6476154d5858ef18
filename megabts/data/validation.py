"""Validation windows: a dataset, or a split of it, read in order and once."""

import numpy as np

from megabts.data.indexed import IndexedDataset
from megabts.data.samples import SampleIndices, count_tokens, read_sample, sample_index


class ValidationSet:
    """One domain's validation windows, in document order: window w holds tokens [w * seq, w * seq + seq] of the range.

    Windows do not overlap but for the shared target token, so every token is predicted once; what is left after the
    last full window is not used. Of more than `max_samples` windows that many are taken, spread evenly over the whole
    range, always the same ones.

    Attributes:
        bytes_per_token: text bytes per token of the whole file, for bits per byte; None when its sidecar does not say.

    Raises:
        UserError: the range is empty or does not fill one window.
    """

    def __init__(
        self, indexed: IndexedDataset, begin: int, end: int, seq_length: int, max_samples: int | None = None
    ) -> None:
        self.indexed = indexed
        self.seq_length = seq_length
        num_windows = (count_tokens(indexed, begin, end, seq_length) - 1) // seq_length
        num_taken = num_windows if max_samples is None else min(max_samples, num_windows)
        document = np.arange(begin, end, dtype=np.int32)
        windows = sample_index(indexed.lengths, document, seq_length, num_windows)
        taken = np.arange(num_taken, dtype=np.int64) * num_windows // max(num_taken, 1)
        self.indices = SampleIndices(document, windows, taken)
        self.bytes_per_token = _bytes_per_token(indexed)

    def __len__(self) -> int:
        return len(self.indices.shuffle)

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index` of those taken: int64 [seq_length + 1]."""
        return read_sample(self.indexed, self.indices, index)

    def source(self, index: int) -> str:
        """Path prefix of the dataset read from."""
        return self.indexed.prefix


def _bytes_per_token(indexed: IndexedDataset) -> float | None:
    text_bytes, tokens = indexed.sidecar.get("text_bytes"), indexed.sidecar.get("tokens")
    if not isinstance(text_bytes, int) or not isinstance(tokens, int) or min(text_bytes, tokens) < 1:
        return None
    return text_bytes / tokens
