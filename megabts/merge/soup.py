"""Model soup: the weighted average of all members' weights (Wortsman et al., arXiv 2203.05482). No training."""

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from megabts.errors import UsageError


def average(members: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i members[i] / sum_i w_i for each parameter, computed in fp32 at least, in the first member's type.

    The members have the same parameters; of one with weight 0 nothing is used, were it infinite. Raises UsageError for
    weights that have no positive sum.
    """
    if not isfinite(sum(weights)) or sum(weights) <= 0 or min(weights) < 0:
        raise UsageError(f"soup weights {list(weights)} must be finite, at least 0 and have a positive sum")
    shares = [(member, weight / sum(weights)) for member, weight in zip(members, weights, strict=True) if weight > 0]
    merged = {}
    for name, first in members[0].items():
        exact = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros(first.shape, dtype=exact)
        for member, share in shares:
            total.add_(member[name].to(exact), alpha=share)
        merged[name] = total.to(first.dtype)
    return merged
