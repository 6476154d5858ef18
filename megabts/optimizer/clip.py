"""Global gradient norm and clipping on the flat gradient buffer."""

import torch
from torch import Tensor

_BLOCK = 1 << 16
"""Elements whose squares are added in one go: one fp32 sum over all of them loses 0.1 % at 20 million on CPU."""


def clip_gradients(flat: Tensor, max_norm: float) -> float:
    """L2 norm of the flat gradients, which are scaled down to `max_norm` when they exceed it (0: never).

    Not finite: returned as it is, and nothing is scaled; the caller skips the step.
    """
    norm = torch.nn.utils.get_total_norm(flat.split(_BLOCK)).item()
    if 0 < max_norm < norm < float("inf"):
        flat.mul_(max_norm / norm)
    return norm
