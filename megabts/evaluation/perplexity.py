"""Loss per domain: nats per token, perplexity, bits per byte of text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megabts.data.loader import Batch, Loader
from megabts.data.validation import ValidationSet
from megabts.model.decoder import Model, sequence_loss
from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import name_seed


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


@torch.no_grad()
def domain_losses(
    model: Model,
    sets: Mapping[str, ValidationSet],
    *,
    micro_batch: int,
    dp: Axis,
    device: torch.device,
    eod_id: int | None = None,
    eod_mask_loss: bool = False,
) -> dict[str, DomainLoss]:
    """Loss of `model` on every domain's windows, which are dealt over the data-parallel ranks."""
    model.train(False)
    documents = not model.config.cross_document_attention
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
            document_ids=documents,
            vocab_size=model.config.vocab_size,
        )
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for start in range(dp.rank * micro_batch, len(windows), micro_batch * dp.size):
            batch = loader.read(start, min(micro_batch, len(windows) - start))
            total[0] += batch_loss(model, batch, device).double()
            total[1] += float(batch.loss_mask.sum())
        loss, tokens = all_reduce(total, dp).tolist()
        results[domain] = DomainLoss(loss / tokens if tokens else math.nan, int(tokens), windows.bytes_per_token)
    model.train(True)
    return results


def batch_loss(model: Model, batch: Batch, device: torch.device, seed: int | None = None) -> torch.Tensor:
    """Sum of the cross-entropy over one micro-batch, in nats. `seed` and a sample's number decide its dropout masks."""
    samples = range(batch.first_sample, batch.first_sample + len(batch.tokens))
    documents = None if batch.document_ids is None else torch.from_numpy(batch.document_ids).to(device)
    return sequence_loss(
        model,
        torch.from_numpy(batch.tokens).to(device),
        torch.from_numpy(batch.labels).to(device),
        torch.from_numpy(batch.loss_mask).to(device),
        document_ids=documents,
        dropout_seeds=None if seed is None else [name_seed(f"sample {sample}", seed) for sample in samples],
    )
