"""The schedules against their end points, PyTorch's own schedulers, and hand computations."""

import math

import pytest
import torch

from megabts.config.run import OptimizerConfig
from megabts.errors import UsageError
from megabts.optimizer.schedule import learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimizerConfig(**{"lr": 2.0, "min_lr_ratio": 0.1, **settings})  # type: ignore[arg-type]
    return [learning_rate(step, config, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (7, 0), (7, 6), (100, 10)])
def test_ends_exactly_at_the_lowest_rate(schedule: str, steps: int, warmup: int) -> None:
    values = rates(steps, schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.37)
    assert values[-1] == 2.0 * 0.37
    assert max(values) <= 2.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    values = rates(50, schedule=schedule, warmup_steps=4)
    assert values[:4] == [0.5, 1.0, 1.5, 2.0]
    assert values[3:] == sorted(values[3:], reverse=True)


def test_cosine_agrees_with_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.2)
    expected = []
    for _ in range(20):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert rates(20, schedule="cosine") == pytest.approx(expected)


def test_linear_falls_evenly() -> None:
    values = rates(10, schedule="linear", min_lr_ratio=0.0)
    assert values == pytest.approx([2.0 - 0.2 * k for k in range(1, 11)])


def test_wsd_is_flat_until_its_decay() -> None:
    values = rates(100, schedule="wsd", warmup_steps=10, wsd_decay=0.2, min_lr_ratio=0.0)
    assert set(values[9:80]) == {2.0}
    assert values[84] == pytest.approx(2.0 * (1 - math.sqrt(5 / 20)))


def test_constant_keeps_the_peak_and_runs_past_the_end_keep_the_last_rate() -> None:
    assert rates(5, schedule="constant") == [2.0] * 5
    config = OptimizerConfig(lr=2.0, min_lr_ratio=0.1, schedule="cosine")
    assert learning_rate(10, config, 5) == learning_rate(4, config, 5)


@pytest.mark.parametrize("warmup", [10, 11])
def test_warm_up_must_end_before_the_run(warmup: int) -> None:
    with pytest.raises(UsageError, match=r"warmup_steps .* does not fit train.steps 10"):
        learning_rate(0, OptimizerConfig(warmup_steps=warmup), 10)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_wsd_share_is_checked(share: float) -> None:
    with pytest.raises(UsageError, match="wsd_decay"):
        learning_rate(0, OptimizerConfig(schedule="wsd", wsd_decay=share), 10)
