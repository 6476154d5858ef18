"""From logits to one token a row: greedy, temperature, top-k, top-p. Pure functions; randomness comes in as generators.

Filters apply in the usual order: temperature, then the k likeliest tokens, then, renormalised over those, the smallest
set of likeliest tokens whose probability reaches p. Ties go to the lower id, so a filter never keeps more than it says.
Probabilities are float64: at 128k tokens the rounding of a float32 running sum is larger than a rare token.
Every row draws from its own generator: what it gets does not depend on its neighbours in the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-12
"""How far a running sum of probabilities may fall short of p and still be p."""


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Token ids [b] for logits [b, V], with one CPU generator a row; temperature 0 is greedy and draws nothing."""
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    return draw(probabilities(logits, temperature, top_k, top_p), uniform.to(logits.device))


def probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Distribution [b, V], float64, that logits [b, V] mean at temperature > 0; top_k 0 and top_p 1 are off."""
    exact = logits.double()
    # The largest logit becomes 0 before the division, so that a tiny temperature cannot overflow to inf - inf.
    exact = (exact - exact.amax(-1, keepdim=True)) / temperature
    if not 0 < top_k < logits.shape[-1] and top_p >= 1:
        return exact.softmax(-1)
    ranked, order = exact.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < logits.shape[-1]:
        ranked[:, top_k:] = -torch.inf
    kept = ranked.softmax(-1)
    if top_p < 1:
        beyond = kept.cumsum(-1) - kept >= top_p - ROUNDING
        beyond[:, 0] = False  # the likeliest token stays, however small p is
        kept = kept.masked_fill(beyond, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [b] by inverting the running sum of probabilities [b, V] at uniform [b], in [0, 1).

    A token of probability 0 is never drawn.
    """
    running = probabilities.cumsum(-1)
    total = running[:, -1:].contiguous()
    last = torch.searchsorted(running, total)  # the last token that is possible at all
    drawn = torch.searchsorted(running, uniform.unsqueeze(-1) * total, right=True)
    return torch.minimum(drawn, last).squeeze(-1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [V] with those of the `seen` ids, bool [V], divided by the penalty where positive, else multiplied.

    Keskar et al. (arXiv 1909.05858, section 4.1), in the form of transformers, for which a logit's sign matters.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
