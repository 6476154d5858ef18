"""Two watches over training: the shape of Adam's updates, and spikes of loss and gradient norm.

Adam can enter a state in which its update is large and uncorrelated with the gradient; it shows as a loss spike
(arXiv 2304.09871). `AdamMonitor` measures, per group of parameters, the update's norm, its cosine with the gradient,
and the shape of the ratio r = m / (sqrt(v) + eps): bell-shaped around 0 while gradients are independent from step to
step, two modes near +-1 once they are correlated in time. Its statistics are plain sums, so sharded tensors add up to
the same answer: sum over the tensors of a group, all-reduce, then `health`.

`SpikeGuard` decides whether a step is fit to be taken. It sees reduced values only (the global loss and gradient norm),
so every rank decides alike without a further message. Its limit: it learns from the run itself, so a run that is bad
from the first step looks normal to it.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from megabts.errors import UserError


@dataclass(frozen=True)
class AdamHealth:
    """What one group's optimizer state says."""

    update_norm: float
    """Euclidean norm of Adam's direction r, before learning rate and weight decay."""
    cosine: float
    """Cosine between r and the gradient; near 0 with a large update is the unstable state."""
    bimodality: float
    """Bimodality coefficient of r made symmetric, E[r^2]^2 / E[r^4]: 1/3 Gaussian, 5/9 uniform, 1 two points."""
    near_one: float
    """Share of the elements with 0.5 <= |r| <= 1.5."""
    warning: bool
    """r is bimodal near +-1."""


@dataclass(frozen=True)
class AdamMonitor:
    """Statistics of AdamW's state; a value object, it keeps nothing between calls.

    The first `settle_steps` updates never warn: after one update r is +-1 whatever the gradients are, and it takes a
    few horizons of the first moment until that is forgotten. Nor do groups of fewer than `min_elements`.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    threshold: float = 0.6
    min_elements: int = 100

    @property
    def settle_steps(self) -> int:
        """Three horizons of the first moment, in steps."""
        return math.ceil(3 / (1 - self.beta1))

    def ratio(self, m: Tensor, v: Tensor, step: int) -> Tensor:
        """Adam's direction r = m' / (sqrt(v') + eps) after `step` updates (from 1); moments' shape, float32.

        m' and v' are corrected for their start at zero, as in Adam.
        """
        m_hat = m.float() / (1 - self.beta1**step)
        v_hat = v.float() / (1 - self.beta2**step)
        return m_hat / (v_hat.sqrt() + self.eps)

    @torch.no_grad()
    def statistics(self, grad: Tensor, m: Tensor, v: Tensor, step: int) -> Tensor:
        """Sums over one tensor (or shard): float64 [elements, r^2, r^4, near one, r * grad, grad^2].

        Elements that never had a gradient (v = 0: unseen rows of an embedding) are left out. Sums of different
        tensors and ranks add.
        """
        ratio, gradient = self.ratio(m, v, step), grad.float()
        seen = v > 0
        square = ratio.square()
        near = seen & (square >= 0.25) & (square <= 2.25)
        sums = [seen, square, square.square(), near, ratio * gradient, gradient.square()]
        return torch.stack([part.sum(dtype=torch.float64) for part in sums])

    @torch.no_grad()
    def histogram(self, m: Tensor, v: Tensor, step: int, bins: int = 40, limit: float = 2.0) -> Tensor:
        """Counts of r in `bins` equal bins over [-limit, limit], int64 [bins]; elements without a gradient left out.

        Values beyond the limit go to the outermost bins. Counts of different tensors and ranks add.
        """
        ratio = self.ratio(m, v, step)[v > 0].clamp(-limit, limit)
        index = ((ratio + limit) * (bins / (2 * limit))).long().clamp(0, bins - 1)
        return torch.bincount(index.flatten(), minlength=bins)

    def health(self, statistics: Tensor, step: int) -> AdamHealth:
        """Judge the summed statistics of one group after `step` updates."""
        count, second, fourth, near, dot, gradient = statistics.tolist()
        norms = math.sqrt(second) * math.sqrt(gradient)
        bimodality = second**2 / (count * fourth) if fourth > 0 else 0.0
        near_one = near / count if count else 0.0
        return AdamHealth(
            update_norm=math.sqrt(second),
            cosine=dot / norms if norms > 0 else 0.0,
            bimodality=bimodality,
            near_one=near_one,
            warning=(
                step > self.settle_steps
                and count >= self.min_elements
                and bimodality > self.threshold
                and near_one > 0.5
            ),
        )


@dataclass
class RunningStatistics:
    """Mean and variance of a series: exact over the first `window` values, exponentially forgetting after."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float, window: int) -> None:
        """Take in one value."""
        self.count += 1
        weight = 1 / min(self.count, window)
        delta = value - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta**2)

    def deviations(self, value: float, floor: float) -> float:
        """How many standard deviations, of at least `floor`, `value` lies above the mean."""
        return (value - self.mean) / max(math.sqrt(self.variance), floor)


@dataclass
class SpikeGuard:
    """Says which steps to skip: loss or gradient norm not finite, or far above their recent values.

    The loss is judged as it is with a standard deviation of at least 1% of its mean, the gradient norm by its
    logarithm (its noise is multiplicative, and clipping tames it) with at least 25%. Skipped steps do not enter the
    statistics.
    """

    sigma: float = 6.0
    """Standard deviations above the mean that count as a spike; 0 skips only what is not finite."""
    window: int = 100
    """Steps the statistics look back on."""
    min_steps: int = 50
    """Good steps before spikes are judged."""
    limit: int = 3
    """Bad steps in a row after which `exhausted` says that the run should stop."""
    consecutive: int = 0
    """Bad steps in a row up to now."""
    skipped: int = 0
    """Bad steps in all."""
    loss: RunningStatistics = field(default_factory=RunningStatistics)
    log_grad_norm: RunningStatistics = field(default_factory=RunningStatistics)

    @property
    def exhausted(self) -> bool:
        """There were `limit` bad steps in a row."""
        return self.consecutive >= self.limit

    def observe(self, loss: float, grad_norm: float) -> str:
        """Judge one step and remember it. Returns why the step must be skipped; empty when it is good."""
        reason = self._reason(loss, grad_norm)
        if reason:
            self.consecutive += 1
            self.skipped += 1
            return reason
        self.consecutive = 0
        self.loss.add(loss, self.window)
        if grad_norm > 0:
            self.log_grad_norm.add(math.log(grad_norm), self.window)
        return ""

    def _reason(self, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if self.sigma <= 0:
            return ""
        if self.loss.count >= self.min_steps:
            deviations = self.loss.deviations(loss, 0.01 * abs(self.loss.mean))
            if deviations > self.sigma:
                return f"loss {loss:.4g} is {deviations:.1f} sigma above its mean {self.loss.mean:.4g}"
        if self.log_grad_norm.count >= self.min_steps and grad_norm > 0:
            deviations = self.log_grad_norm.deviations(math.log(grad_norm), 0.25)
            if deviations > self.sigma:
                usual = math.exp(self.log_grad_norm.mean)
                return f"gradient norm {grad_norm:.4g} is {deviations:.1f} sigma above its usual {usual:.4g}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values: counters and statistics, not the settings."""
        state = asdict(self)
        return {name: state[name] for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state from `state_dict`; raises `UserError` when it is not one."""
        statistics = {f.name for f in fields(RunningStatistics)}
        if set(state) != set(STATE) or any(set(state[name]) != statistics for name in STATE[2:]):
            raise UserError(f"the spike guard's saved state has the keys {sorted(state)}, not {sorted(STATE)}")
        self.consecutive, self.skipped = int(state["consecutive"]), int(state["skipped"])
        self.loss = RunningStatistics(**state["loss"])
        self.log_grad_norm = RunningStatistics(**state["log_grad_norm"])


STATE = ("consecutive", "skipped", "loss", "log_grad_norm")
"""Fields of `SpikeGuard` that change while training."""
