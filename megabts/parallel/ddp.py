"""Data parallelism: one flat fp32 gradient buffer over the trainable parameters, summed over the dp axis.

Autograd's gradients are added to the buffer as they come and freed at once, so low-precision parameters accumulate in
fp32 over micro-batches. Frozen parameters have no place in it.
"""

import torch
from torch import Tensor, nn

from megabts.parallel.collectives import all_reduce
from megabts.parallel.mesh import Axis


class GradientBuffer:
    """Flat gradients of `parameters`; `views[i]` has the shape of parameters[i]."""

    def __init__(self, parameters: list[nn.Parameter], dp: Axis) -> None:
        self.dp = dp
        exact = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        device = parameters[0].device if parameters else torch.device("cpu")
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=exact, device=device)
        self.views = split_like(self.flat, parameters)
        for parameter, view in zip(parameters, self.views, strict=True):
            parameter.register_post_accumulate_grad_hook(_accumulate_into(view))

    def zero(self) -> None:
        """Forget all gradients."""
        self.flat.zero_()

    def sync(self) -> None:
        """Sum the gradients over the data-parallel ranks."""
        all_reduce(self.flat, self.dp)


def split_like(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Views into `flat`, one in the shape of each parameter."""
    pieces = flat.split([p.numel() for p in parameters]) if parameters else ()
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def _accumulate_into(view: Tensor):  # type: ignore[no-untyped-def]
    def hook(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        view.add_(parameter.grad)
        parameter.grad = None

    return hook
