"""Loss per domain: nats per token, perplexity, bits per byte of text."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megabts.config.model import ModelConfig
from megabts.data.loader import Batch, Loader
from megabts.data.validation import ValidationSet
from megabts.model.decoder import Model, sequence_loss
from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis


@dataclass(frozen=True)
class DomainLoss:
    """One domain's validation result."""

    loss: float
    """Mean cross-entropy, nats per token; not a number when every token is masked."""
    tokens: int
    """Tokens predicted."""
    bytes_per_token: float | None
    """Of the domain's text; None when the dataset does not say."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """loss / ln 2 / (bytes per token): comparable across tokenizers."""
        return None if self.bytes_per_token is None else self.loss / math.log(2) / self.bytes_per_token


def domain_losses(
    loss: Callable[[Batch], Tensor],
    sets: Mapping[str, ValidationSet],
    *,
    model: ModelConfig,
    micro_batch: int,
    dp: Axis,
    device: torch.device,
    eod_id: int | None = None,
    eod_mask_loss: bool = False,
) -> dict[str, DomainLoss]:
    """Loss on every domain's windows, which are dealt over the data-parallel ranks.

    `loss` gives the sum of a micro-batch's cross-entropy, nats, by a model with the sizes `model`.
    """
    results = {}
    for domain, windows in sets.items():
        loader = Loader(
            windows,
            micro_batch=micro_batch,
            global_batch=micro_batch * dp.size,
            dp_rank=dp.rank,
            dp_size=dp.size,
            seq_length=windows.seq_length,
            eod_id=eod_id,
            eod_mask_loss=eod_mask_loss,
            document_ids=not model.cross_document_attention,
            vocab_size=model.vocab_size,
        )
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for first in range(0, len(windows), micro_batch * dp.size):
            start = first + dp.rank * micro_batch
            if start < len(windows):
                batch = loader.read(start, min(micro_batch, len(windows) - start))
            else:  # nothing is left for this rank, but others may send tokens to its ffn experts
                batch = loader.read(0, 1)
                batch.loss_mask[:] = 0
            total[0] += loss(batch).double()
            total[1] += float(batch.loss_mask.sum())
        loss_sum, tokens = all_reduce(total, dp).tolist()
        results[domain] = DomainLoss(loss_sum / tokens if tokens else math.nan, int(tokens), windows.bytes_per_token)
    return results


@torch.no_grad()
def batch_loss(model: Model, batch: Batch, device: torch.device) -> Tensor:
    """Sum of the cross-entropy over one micro-batch, in nats, by a whole model; nothing is kept for a backward pass."""
    return sequence_loss(
        model,
        to_device(batch.tokens, device),
        to_device(batch.labels, device),
        to_device(batch.loss_mask, device),
        document_ids=None if batch.document_ids is None else to_device(batch.document_ids, device),
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor there."""
    return torch.from_numpy(array).to(device)
