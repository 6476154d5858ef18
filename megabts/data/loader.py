"""Batches for one data-parallel rank, a function of how many samples were consumed and nothing else.

The samples of a step are the next `global_batch` ones. Micro step k takes the slice
[c + k * micro * dp, c + (k + 1) * micro * dp), cut contiguously by data-parallel rank (Megatron-LM's order). So one
integer resumes a run, at any number of ranks: the samples of a step are the same ones, only dealt to other ranks.
Every rank reads its own samples from the memory-mapped files; nothing is sent. Arrays are numpy's, to be wrapped
without a copy.

Limit: one reading thread, one step ahead; it hides the disk and the indexing, which take far less than a step.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megabts.data.samples import Dataset
from megabts.errors import UsageError, UserError


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens: np.ndarray
    """Inputs, int64 [samples, seq]."""
    labels: np.ndarray
    """The token after each input, int64 [samples, seq]."""
    loss_mask: np.ndarray
    """1 where the loss counts, float32 [samples, seq]."""
    document_ids: np.ndarray | None
    """Which of its sample's documents a position belongs to, from 0, int64 [samples, seq]; None if not asked for."""
    first_sample: int
    """Number of the first sample in the run's order; the others follow on."""


class Loader:
    """Deals a dataset's samples to the micro-batches of one data-parallel rank.

    Args:
        dataset: samples of `seq_length` + 1 tokens.
        micro_batch: samples per micro-batch and rank.
        global_batch: samples per step over all ranks and micro-batches.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        seq_length: tokens per sample.
        eod_id: end-of-document token; needed for the next two.
        eod_mask_loss: no loss where the input is the end-of-document token.
        document_ids: fill `Batch.document_ids`; the end-of-document token belongs to the document it ends.
        vocab_size: tokens the model knows; others met in a batch are refused. None: not checked.

    Raises:
        UsageError: the global batch is not a whole number of micro-batches on every rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch: int,
        global_batch: int,
        dp_rank: int,
        dp_size: int,
        seq_length: int,
        eod_id: int | None = None,
        eod_mask_loss: bool = False,
        document_ids: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}"
        if min(micro_batch, global_batch) < 1 or global_batch % (micro_batch * dp_size):
            raise UsageError(
                f"train.global_batch {global_batch} is not a multiple of train.micro_batch {micro_batch} x {dp_size} "
                f"data-parallel ranks = {micro_batch * dp_size}"
            )
        if eod_id is None and (eod_mask_loss or document_ids):
            raise UsageError("masking or separating documents needs the tokenizer's end-of-document id, which it lacks")
        self.dataset = dataset
        self.micro_batch = micro_batch
        self.global_batch = global_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seq_length = seq_length
        self.eod_id = eod_id
        self.eod_mask_loss = eod_mask_loss
        self.document_ids = document_ids
        self.vocab_size = vocab_size

    def step_batches(self, consumed_samples: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins after `consumed_samples` samples.

        Raises:
            UserError: the dataset ends within the step, or holds a token the model does not know.
        """
        end = consumed_samples + self.global_batch
        if end > len(self.dataset):
            raise UserError(
                f"the step after sample {consumed_samples} needs {self.global_batch} more, the data has "
                f"{len(self.dataset)} in all; lower train.steps or start a new run"
            )
        first = consumed_samples + self.dp_rank * self.micro_batch
        return [self.read(start, self.micro_batch) for start in range(first, end, self.micro_batch * self.dp_size)]

    def read(self, first_sample: int, num_samples: int) -> Batch:
        """Samples [first_sample, first_sample + num_samples) as one batch, whatever the batch sizes."""
        rows = np.empty((num_samples, self.seq_length + 1), dtype=np.int64)
        for row in range(num_samples):
            rows[row] = self.dataset[first_sample + row]
        self._check_tokens(rows, first_sample)
        tokens = np.ascontiguousarray(rows[:, :-1])
        ends = tokens == self.eod_id if self.eod_id is not None else np.zeros_like(tokens, dtype=bool)
        mask = (~ends if self.eod_mask_loss else np.ones_like(ends)).astype(np.float32)
        documents = np.cumsum(ends, axis=1, dtype=np.int64) - ends if self.document_ids else None
        return Batch(tokens, np.ascontiguousarray(rows[:, 1:]), mask, documents, first_sample)

    def iterate(self, consumed_samples: int) -> Generator[list[Batch], None, None]:
        """`step_batches` from `consumed_samples` to the dataset's last full step, each read while its forerunner is
        used.

        An error met while reading is raised when its step is asked for. Closing the generator ends the thread.
        """
        starts = range(consumed_samples, len(self.dataset) - self.global_batch + 1, self.global_batch)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as reader:
            ahead = None
            for start in starts:
                current = ahead or reader.submit(self.step_batches, start)
                following = start + self.global_batch
                ahead = reader.submit(self.step_batches, following) if following in starts else None
                yield current.result()

    def _check_tokens(self, rows: np.ndarray, first_sample: int) -> None:
        if self.vocab_size is None:
            return
        if rows.max() < self.vocab_size and rows.min() >= 0:
            return
        row, place = np.argwhere((rows < 0) | (rows >= self.vocab_size))[0]
        raise UserError(
            f"{self.dataset.source(first_sample + int(row))}: token {rows[row, place]} in sample {first_sample + row}, "
            f"model.vocab_size is {self.vocab_size}; the data was made with another tokenizer or is damaged"
        )
