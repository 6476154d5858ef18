"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

Step k counts from 1 (`step` = k - 1 counts finished updates). During warm-up the rate is lr * k / warmup_steps, so the
first update already moves and step k = warmup_steps has the peak. After it, with x running from 0 (end of warm-up, or
of wsd's stable phase) to 1 (last step), the rate falls from lr to lr * min_lr_ratio as

- cosine: (1 + cos(pi x)) / 2
- linear: 1 - x
- wsd:    1 - sqrt(x) over the last `wsd_decay` of all steps, lr before (arXiv 2405.18392 finds it better than linear)
- constant: no decay; min_lr_ratio has no meaning here.

Every schedule but constant ends at exactly lr * min_lr_ratio on the last step.
"""

import math

from megabts.config.run import OptimizerConfig
from megabts.errors import UsageError


def learning_rate(step: int, config: OptimizerConfig, steps: int) -> float:
    """Learning rate of the update that follows `step` finished ones, in a run of `steps` updates.

    Past the last step the last rate stays. Raises `UsageError` when the warm-up does not end before the run does.
    """
    assert step >= 0, "steps count from 0"
    check_schedule(config, steps)
    k = min(step + 1, steps)
    if k <= config.warmup_steps:
        return config.lr * k / config.warmup_steps
    remaining = _remaining_share(k, config, steps)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


def check_schedule(config: OptimizerConfig, steps: int) -> None:
    """Raise `UsageError` for a schedule that a run of `steps` updates cannot follow."""
    if not 0 <= config.warmup_steps < steps:
        raise UsageError(
            f"optimizer.warmup_steps {config.warmup_steps} does not fit train.steps {steps}; "
            f"use 0 to {steps - 1} warm-up steps"
        )


def _remaining_share(k: int, config: OptimizerConfig, steps: int) -> float:
    """What is left, from 1 to 0, of the way from the peak to the lowest rate at step `k` after warm-up."""
    if config.schedule == "constant":
        return 1.0
    decay_steps = steps - config.warmup_steps
    if config.schedule == "wsd":
        decay_steps = min(decay_steps, max(1, round(config.wsd_decay * steps)))
    x = max(0, k - (steps - decay_steps)) / decay_steps
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * x)) / 2
    if config.schedule == "linear":
        return 1 - x
    return 1 - math.sqrt(x)
