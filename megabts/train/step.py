"""One training step, whole: forward and backward over the micro-batches, gradient sync, clip, optimizer."""

from dataclasses import dataclass

import torch

from megabts.config.run import RunConfig
from megabts.data.loader import Batch
from megabts.optimizer.adamw import MasterAdamW
from megabts.optimizer.clip import clip_gradients
from megabts.optimizer.schedule import learning_rate
from megabts.optimizer.stability import SpikeGuard
from megabts.parallel.collectives import all_reduce
from megabts.runtime.progress import Progress
from megabts.train.stages import Stages


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all data-parallel ranks."""

    loss: float
    """Mean cross-entropy, nats per token."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Tokens that counted in the loss."""
    skipped: str
    """Why the parameters were left as they were; empty when they were updated."""


def train_step(
    stages: Stages,
    optimizer: MasterAdamW,
    guard: SpikeGuard,
    batches: list[Batch],
    step: int,
    config: RunConfig,
    progress: Progress,
) -> StepResult:
    """Step number `step` (from 0) on this rank's micro-batches.

    The loss is the sum over tokens divided by the valid tokens of the whole global batch, which are counted first.
    """
    dp = stages.mesh.dp
    count = torch.tensor(float(sum(batch.loss_mask.sum() for batch in batches)), dtype=torch.float64)
    tokens = max(all_reduce(count.to(stages.device), dp).item(), 1.0)
    optimizer.gradients.zero()
    progress.enter("forward and backward")
    overlap = optimizer.gradients.overlap
    losses = stages.losses(batches, config.train.seed, step=step, backward=True, last_backward=overlap)
    progress.enter("the gradient sum")
    optimizer.gradients.sync()
    optimizer.gradients.divide(tokens)  # in fp32, and not in backward, where bf16 would round the factor
    mean_loss = all_reduce(stages.total(losses.sum()), dp).item() / tokens
    norm = clip_gradients(optimizer.gradients, config.optimizer.clip_grad)
    lr = learning_rate(step, config.optimizer, config.train.steps)
    skipped = guard.observe(mean_loss, norm)
    progress.enter("the optimizer")
    if not skipped:
        optimizer.step(lr)
    return StepResult(mean_loss, norm, lr, int(tokens), skipped)
