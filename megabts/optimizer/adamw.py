"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on flat fp32 masters of the trainable parameters.

Parameters are ordered by (learning-rate scale, weight decay), so that each such group is one slice of the flat
gradient, master and moment buffers, and one fused kernel steps it. Parameters of any precision are written back from
the fp32 masters. State is kept per parameter name, so a checkpoint knows nothing of the flat layout.
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from torch import Tensor, nn

from megabts.config.run import OptimizerConfig
from megabts.errors import UserError
from megabts.parallel.ddp import GradientBuffer, split_like
from megabts.parallel.mesh import Axis

MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """Steps `named` trainable parameters from the gradients that `gradients` gathers.

    Attributes:
        names, parameters: in the order of the flat buffers.
        gradients: the flat gradient buffer over the same parameters.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, dp: Axis) -> None:
        keyed = [((lr_scale(n, config), p.dim() > 1), n, p) for n, p in named if p.requires_grad]
        keyed.sort(key=lambda item: item[0])
        self.names = [name for _, name, _ in keyed]
        self.parameters = [parameter for _, _, parameter in keyed]
        self.gradients = GradientBuffer(self.parameters, dp)
        self.master = torch.empty_like(self.gradients.flat)
        self.moments = {moment: torch.zeros_like(self.master) for moment in MOMENTS}
        self.copy_from_parameters()
        groups, start = [], 0
        for (scale, decays), members in groupby(keyed, key=lambda item: item[0]):
            end = start + sum(p.numel() for _, _, p in members)
            flat = nn.Parameter(self.master[start:end])
            flat.grad = self.gradients.flat[start:end]
            decay = config.weight_decay if decays else 0.0
            groups.append({"params": [flat], "weight_decay": decay, "scale": scale, "range": (start, end)})
            start = end
        betas = (config.beta1, config.beta2)
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True) if groups else None
        self._set_state(0)

    def _set_state(self, steps: int) -> None:
        """Hand the flat moments, as of `steps` steps, to the fused optimizer."""
        if self.adamw is None:
            return
        for group in self.adamw.param_groups:
            start, end = group["range"]
            (flat,) = group["params"]
            state = {moment: buffer[start:end] for moment, buffer in self.moments.items()}
            self.adamw.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **state}

    @torch.no_grad()
    def copy_from_parameters(self) -> None:
        """Take the masters from the parameters, at the start."""
        for view, parameter in zip(split_like(self.master, self.parameters), self.parameters, strict=True):
            view.copy_(parameter)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One AdamW step at learning rate `lr` (times each group's scale); parameters are written back."""
        if self.adamw is None:
            return
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["scale"]
        self.adamw.step()
        torch._foreach_copy_(list(self.parameters), split_like(self.master, self.parameters))

    def named_state(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """(name, gradient, first moment, second moment) of every parameter, flat."""
        sizes = [parameter.numel() for parameter in self.parameters]
        buffers = (self.gradients.flat, *(self.moments[moment] for moment in MOMENTS))
        return zip(self.names, *(buffer.split(sizes) for buffer in buffers), strict=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and masters by `KIND.PARAMETER`, each in the parameter's shape (views, not copies)."""
        buffers = {"master": self.master, **self.moments}
        return {
            f"{kind}.{name}": view
            for kind, flat in buffers.items()
            for name, view in zip(self.names, split_like(flat, self.parameters), strict=True)
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Continue from `state_dict`'s tensors after `steps` steps; parameters are written from the masters.

        Raises UserError when the tensors are another model's or another set of trainable parameters.
        """
        mine = self.state_dict()
        if mine.keys() != tensors.keys():
            differing = sorted(mine.keys() ^ tensors.keys())
            raise UserError(
                f"the optimizer state does not fit the trainable parameters: {differing[:3]} on one side only"
            )
        for name, view in mine.items():
            if tensors[name].shape != view.shape:
                theirs = tuple(tensors[name].shape)
                raise UserError(f"the optimizer state does not fit: {name} is {theirs}, here {tuple(view.shape)}")
        for name, view in mine.items():
            view.copy_(tensors[name])
        self._set_state(steps)
        if self.parameters:
            torch._foreach_copy_(list(self.parameters), split_like(self.master, self.parameters))


def lr_scale(name: str, config: OptimizerConfig) -> float:
    """The learning-rate factor of a parameter: that of the first pattern its name matches, else 1."""
    return next((scale for pattern, scale in config.lr_scale.items() if fnmatchcase(name, pattern)), 1.0)


def freeze_unscaled(model: nn.Module, config: OptimizerConfig) -> None:
    """Freeze the parameters whose learning-rate factor is 0.

    Raises UserError for a pattern that matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.lr_scale:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"optimizer.lr_scale pattern {pattern!r} matches no parameter; names are like {names[-1]}")
    for name, parameter in model.named_parameters():
        if lr_scale(name, config) == 0:
            parameter.requires_grad_(False)
