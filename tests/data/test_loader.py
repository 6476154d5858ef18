"""The loader deals one global order at any number of ranks, and resumes by one integer."""

import threading
import time

import numpy as np
import pytest

from megabts.data.loader import Batch, Loader
from megabts.errors import UsageError, UserError

SEQ = 6


class Rows:
    """Sample i is i * 100, i * 100 + 1, ...; or given rows."""

    def __init__(self, size: int, rows: list[list[int]] | None = None) -> None:
        self.size = size
        self.rows = rows
        self.read: list[int] = []
        self.fail_at: int | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> np.ndarray:
        if index == self.fail_at:
            raise UserError("disk on fire")
        self.read.append(index)
        return np.arange(SEQ + 1) + index * 100 if self.rows is None else np.array(self.rows[index])

    def source(self, index: int) -> str:
        return f"file{index}"


def loader(dataset: Rows, rank: int = 0, size: int = 1, micro: int = 2, batch: int = 8, **options: object) -> Loader:
    return Loader(
        dataset,
        micro_batch=micro,
        global_batch=batch,
        dp_rank=rank,
        dp_size=size,
        seq_length=SEQ,
        **options,  # type: ignore[arg-type]
    )


def numbers(batch: Batch) -> list[int]:
    return (batch.tokens[:, 0] // 100).tolist()


def step_order(consumed: int, size: int, micro: int, batch: int = 8) -> list[int]:
    """Samples of a step in order of micro step, then rank."""
    ranks = [loader(Rows(99), rank, size, micro, batch).step_batches(consumed) for rank in range(size)]
    return [number for micro_step in zip(*ranks) for one in micro_step for number in numbers(one)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_every_rank_count_deals_the_same_order(size: int, micro: int) -> None:
    for consumed in (0, 8, 13):
        assert step_order(consumed, size, micro) == list(range(consumed, consumed + 8))


def test_a_rank_takes_its_slice_of_each_micro_step() -> None:
    batches = loader(Rows(99), rank=1, size=2, micro=2, batch=8).step_batches(16)
    assert [numbers(batch) for batch in batches] == [[18, 19], [22, 23]]
    assert [batch.first_sample for batch in batches] == [18, 22]


def test_resume_equals_the_tail() -> None:
    whole = [[numbers(batch) for batch in step] for step in loader(Rows(43)).iterate(0)]
    assert len(whole) == 5
    for steps in range(6):
        tail = [[numbers(batch) for batch in step] for step in loader(Rows(43)).iterate(8 * steps)]
        assert tail == whole[steps:]


def test_labels_follow_tokens() -> None:
    batch = loader(Rows(9)).read(3, 5)
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (5, SEQ)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (np.int64, np.int64, np.float32)
    assert batch.tokens.flags.c_contiguous
    assert batch.labels.flags.c_contiguous
    np.testing.assert_array_equal(batch.labels, batch.tokens + 1)
    assert batch.loss_mask.min() == 1
    assert batch.document_ids is None
    assert batch.first_sample == 3


def test_documents_in_a_sample() -> None:
    dataset = Rows(1, [[5, 9, 9, 4, 9, 3, 9]])
    batch = loader(dataset, micro=1, batch=1, eod_id=9, eod_mask_loss=True, document_ids=True).step_batches(0)[0]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 2, 2, 3]]
    assert batch.loss_mask.tolist() == [[1, 0, 0, 1, 0, 1]]
    plain = loader(dataset, micro=1, batch=1, eod_id=9).step_batches(0)[0]
    assert plain.loss_mask.tolist() == [[1] * SEQ]


@pytest.mark.parametrize("token", [10, -1])
def test_token_out_of_vocabulary(token: int) -> None:
    rows = [[1] * (SEQ + 1), [1, 2, 3, 4, 5, 6, token]]
    with pytest.raises(UserError, match=rf"file1: token {token} in sample 1, model\.vocab_size is 10"):
        loader(Rows(2, rows), micro=2, batch=2, vocab_size=10).step_batches(0)
    rows[1][-1] = 9
    loader(Rows(2, rows), micro=2, batch=2, vocab_size=10).step_batches(0)


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"global_batch 10 is not a multiple of .*micro_batch 4 x 2 .* = 8"):
        loader(Rows(9), size=2, micro=4, batch=10)
    with pytest.raises(UsageError, match="end-of-document"):
        loader(Rows(9), document_ids=True)
    with pytest.raises(UserError, match=r"after sample 8 needs 8 more, the data has 15"):
        loader(Rows(15)).step_batches(8)


def test_iterate_reads_one_step_ahead() -> None:
    dataset = Rows(80)
    steps = loader(dataset).iterate(0)
    next(steps)
    deadline = time.monotonic() + 5
    while len(dataset.read) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dataset.read == list(range(16))
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    assert dataset.read == list(range(16))


def test_iterate_raises_where_the_step_is_used() -> None:
    dataset = Rows(80)
    dataset.fail_at = 17
    steps = loader(dataset).iterate(0)
    assert [numbers(batch)[0] for batch in next(steps)] == [0, 2, 4, 6]
    assert [numbers(batch)[0] for batch in next(steps)] == [8, 10, 12, 14]
    with pytest.raises(UserError, match="disk on fire"):
        next(steps)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
