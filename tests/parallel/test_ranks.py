"""The helper for real ranks: results by rank, errors by rank, and no hang."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def add_up(rank: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    return rank, total


def raise_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("one is wrong")
    dist.barrier()


def die_on_one(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_on_one(rank: int) -> None:
    time.sleep(1000 * rank)


def test_results_come_by_rank() -> None:
    results = run_ranks(3, add_up, 10)
    assert [(rank, total.item()) for rank, total in results] == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_the_error_of_a_rank_is_raised_and_the_others_are_ended() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: .*ValueError: one is wrong"):
        run_ranks(2, raise_on_one)


def test_a_dead_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 died"):
        run_ranks(2, die_on_one)


def test_a_rank_that_hangs_is_named() -> None:
    with pytest.raises(RankError, match=r"ranks \[(0, )?1\] did not finish"):
        run_ranks(2, sleep_on_one, timeout=6)
