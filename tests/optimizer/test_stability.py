"""The Adam monitor against torch's AdamW and numpy; the spike guard on normal and damaged series."""

import json
import math
import re

import numpy as np
import pytest
import torch

from megabts.errors import UserError
from megabts.optimizer.stability import AdamMonitor, SpikeGuard

MONITOR = AdamMonitor()


def run_moments(gradients: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's raw moments after these gradients, by torch.optim."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = torch.optim.AdamW([parameter], betas=(0.9, 0.95))
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    state = optimizer.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"]


def test_ratio_is_what_torch_moves_parameters_by() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(50) for _ in range(7)]
    parameter = torch.nn.Parameter(torch.zeros(50))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    before = parameter.detach().clone()
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
    state = optimizer.state[parameter]
    ratio = MONITOR.ratio(state["exp_avg"], state["exp_avg_sq"], 7)
    torch.testing.assert_close(before - parameter.detach(), ratio)


def test_health_agrees_with_numpy_and_shards_add_up() -> None:
    torch.manual_seed(1)
    gradients = [torch.randn(400) for _ in range(40)]
    m, v = run_moments(gradients)
    ratio = MONITOR.ratio(m, v, 40).double().numpy()
    gradient = gradients[-1].double().numpy()
    parts = [MONITOR.statistics(gradients[-1][s], m[s], v[s], 40) for s in (slice(0, 130), slice(130, 400))]
    health = MONITOR.health(parts[0] + parts[1], 40)
    assert health.update_norm == pytest.approx(np.linalg.norm(ratio))
    cosine = ratio @ gradient / np.linalg.norm(ratio) / np.linalg.norm(gradient)
    assert health.cosine == pytest.approx(cosine)
    assert health.bimodality == pytest.approx(np.mean(ratio**2) ** 2 / np.mean(ratio**4))
    assert not health.warning


@pytest.mark.parametrize("values", [torch.ones(256), torch.randn(256, generator=torch.Generator().manual_seed(0))])
def test_constant_gradient_warns(values: torch.Tensor) -> None:
    m, v = run_moments([values] * 40)
    health = MONITOR.health(MONITOR.statistics(values, m, v, 40), 40)
    assert health.bimodality > 0.6
    assert health.near_one == 1.0
    assert health.warning


def test_gaussian_gradients_never_warn_in_1000_steps() -> None:
    generator = torch.Generator().manual_seed(3)
    m, v = torch.zeros(512), torch.zeros(512)
    for step in range(1, 1001):
        gradient = torch.randn(512, generator=generator)
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        health = MONITOR.health(MONITOR.statistics(gradient, m, v, step), step)
        assert not health.warning, step


def test_parameters_without_gradient_are_left_out() -> None:
    values = torch.cat([torch.ones(200), torch.zeros(5000)])
    m, v = run_moments([values] * 40)
    assert MONITOR.health(MONITOR.statistics(values, m, v, 40), 40).warning
    assert MONITOR.histogram(m, v, 40).sum() == 200


def test_untouched_and_small_groups_do_not_warn() -> None:
    nothing = torch.zeros(200)
    health = MONITOR.health(MONITOR.statistics(nothing, nothing, nothing, 40), 40)
    assert (health.update_norm, health.cosine, health.bimodality, health.warning) == (0, 0, 0, False)
    few = torch.ones(99)
    m, v = run_moments([few] * 40)
    assert not MONITOR.health(MONITOR.statistics(few, m, v, 40), 40).warning


def test_histogram_agrees_with_numpy() -> None:
    torch.manual_seed(2)
    m, v = run_moments([torch.randn(3000) for _ in range(5)])
    ratio = MONITOR.ratio(m, v, 5).clamp(-2, 2).numpy()
    expected, _ = np.histogram(ratio, bins=20, range=(-2, 2))
    assert MONITOR.histogram(m, v, 5, bins=20).tolist() == expected.tolist()


def feed(guard: SpikeGuard, steps: int, seed: int = 0) -> int:
    """Feed a usual series (falling noisy loss, log-normal gradient norm); returns how many steps were skipped."""
    rng = np.random.default_rng(seed)
    before = guard.skipped
    for step in range(steps):
        loss = 2 + 4 * math.exp(-step / 200) + 0.05 * rng.standard_normal()
        guard.observe(loss, float(np.exp(0.3 * rng.standard_normal())))
    return guard.skipped - before


def test_normal_training_is_not_skipped() -> None:
    assert sum(feed(SpikeGuard(), 2000, seed) for seed in range(5)) <= 5


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.0, "loss is nan"),
        (1.0, math.inf, "gradient norm is inf"),
        (9.0, 1.0, "loss 9 is .* sigma"),
        (2.0, 50.0, "gradient norm 50 is .* sigma"),
    ],
)
def test_bad_steps_are_skipped_with_a_reason(loss: float, grad_norm: float, reason: str) -> None:
    guard = SpikeGuard()
    feed(guard, 400)
    assert re.match(reason, guard.observe(loss, grad_norm))
    assert guard.consecutive == 1
    assert guard.observe(2.5, 1.0) == ""
    assert guard.consecutive == 0
    assert guard.skipped == 1


def test_sigma_zero_skips_only_what_is_not_finite() -> None:
    guard = SpikeGuard(sigma=0)
    feed(guard, 400)
    assert guard.observe(1e6, 1e6) == ""
    assert guard.observe(math.inf, 1.0) == "loss is inf"


def test_three_bad_steps_in_a_row_exhaust() -> None:
    guard = SpikeGuard()
    verdicts = []
    for _ in range(3):
        guard.observe(math.nan, 1.0)
        verdicts.append(guard.exhausted)
    assert verdicts == [False, False, True]


def test_a_resumed_guard_goes_on_alike() -> None:
    guard, resumed = SpikeGuard(), SpikeGuard()
    feed(guard, 120)
    guard.observe(math.nan, 1.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict(), allow_nan=False)))
    assert resumed == guard
    assert feed(resumed, 50, seed=9) == feed(guard, 50, seed=9)
    assert resumed == guard


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(UserError, match="spike guard"):
        SpikeGuard().load_state_dict({"count": 1})
