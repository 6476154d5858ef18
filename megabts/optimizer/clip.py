"""Global gradient norm and clipping on the flat gradient buffer."""

import torch
from torch import Tensor


def clip_gradients(flat: Tensor, max_norm: float) -> float:
    """L2 norm of the flat gradients, which are scaled down to `max_norm` when they exceed it (0: never).

    Not finite: returned as it is, and nothing is scaled; the caller skips the step.
    """
    norm = torch.linalg.vector_norm(flat).item()
    if 0 < max_norm < norm < float("inf"):
        flat.mul_(max_norm / norm)
    return norm
