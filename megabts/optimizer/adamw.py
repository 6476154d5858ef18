"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on fp32 masters, of which a rank holds its shard (ZeRO stage 1).

Masters and moments cover the elements that `GradientBuffer` makes this rank's: 12 bytes for each of P / dp parameters.
A step is one fused kernel (`runtime.adamw_kernel` says whose) over slices that share learning-rate scale and weight
decay; then every bucket's masters are turned into the parameters' precision, gathered over dp and written to the
parameters. State is kept by parameter name and range of elements, so a checkpoint knows nothing of buckets.
"""

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import reduce

import torch
from torch import Tensor, nn

from megabts.config.run import OptimizerConfig
from megabts.errors import UserError
from megabts.parallel.collectives import all_gather
from megabts.parallel.ddp import GradientBuffer, Slot, split_like
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.ranges import joined
from megabts.parallel.sharding import NamedParameters
from megabts.runtime.adamw_kernel import choose_adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)
"""Of tensors in the state."""


class MasterAdamW:
    """Steps the trainable ones of `named` from the gradients that `gradients` gathers.

    `bucket_elements`, `tied` and `device` are those of `GradientBuffer`.

    Attributes:
        names: of the trainable parameters, in the order of the flat buffers.
        gradients: the flat gradient buffer over them.
        master, moments: this rank's shards of all buckets, one after the other.
    """

    def __init__(
        self,
        named: NamedParameters,
        config: OptimizerConfig,
        mesh: ParallelMesh,
        *,
        bucket_elements: int = 25_000_000,
        tied: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.gradients = GradientBuffer(named, mesh, bucket_elements=bucket_elements, tied=tied, device=device)
        self.names = [slot.name for slot in self.gradients.slots]
        self.master = self.gradients.flat.new_zeros(self.gradients.shard_size)
        self.moments = {moment: torch.zeros_like(self.master) for moment in MOMENTS}
        self.copy_from_parameters()
        groups = [
            {
                "params": [self._with_gradient(start, end, shift) for start, end, shift in ranges],
                "ranges": ranges,
                "scale": scale,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (scale, decays), ranges in self._ranges(config).items()
        ]
        self.adamw: torch.optim.Optimizer | None = None
        if groups:
            make = choose_adamw(config.library, self.master.device, self.master.dtype)
            self.adamw = make(groups, betas=(config.beta1, config.beta2), eps=config.eps)
        self._set_state(0)

    def _ranges(self, config: OptimizerConfig) -> dict[tuple[float, bool], list[tuple[int, int, int]]]:
        """By (learning-rate scale, decays): (start, end) in the shards, and how far ahead that is in the gradients."""
        found: dict[tuple[float, bool], dict[int, list[tuple[int, int]]]] = {}
        for slot in self.gradients.slots:
            first, last = slot.covered
            if first < last:
                shift = slot.start + first - slot.offset
                group = found.setdefault((lr_scale(slot.name, config), slot.parameter.dim() > 1), {})
                group.setdefault(shift, []).append((slot.offset, slot.offset + last - first))
        return {
            key: [(start, end, shift) for shift, ranges in group.items() for start, end in joined(ranges)]
            for key, group in found.items()
        }

    def _with_gradient(self, start: int, end: int, shift: int) -> nn.Parameter:
        flat = nn.Parameter(self.master[start:end])
        flat.grad = self.gradients.flat[start + shift : end + shift]
        return flat

    def _set_state(self, steps: int) -> None:
        """Hand the flat moments, as of `steps` steps, to the fused optimizer."""
        if self.adamw is None:
            return
        for group in self.adamw.param_groups:
            group["step"] = steps  # of which each library reads the one that it counts
            for flat, (start, end, _) in zip(group["params"], group["ranges"], strict=True):
                state = {moment: buffer[start:end] for moment, buffer in self.moments.items()}
                self.adamw.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **state}

    @torch.no_grad()
    def copy_from_parameters(self) -> None:
        """Take the masters from the parameters, at the start."""
        for slot in self.gradients.slots:
            first, last = slot.covered
            _of(slot, self.master).copy_(slot.parameter.reshape(-1)[first:last])

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Write the parameters, whole, from the masters of all dp ranks. A copy of one bucket exists at a time."""
        for bucket, shard in zip(self.gradients.buckets, self._by_bucket(self.master), strict=True):
            parameters: list[Tensor] = [slot.parameter for slot in bucket.slots]
            dtype = reduce(torch.promote_types, [parameter.dtype for parameter in parameters])
            whole = shard if bucket.axis.size == 1 else all_gather(shard.to(dtype), bucket.axis, 0)
            torch._foreach_copy_(parameters, split_like(whole, parameters))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One AdamW step at learning rate `lr` (times each group's scale); parameters are written back."""
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr * group["scale"]
            self.adamw.step()
        self.copy_to_parameters()

    def named_state(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """(name, gradient, first moment, second moment), flat, of what this rank counts: sums over all ranks of the
        mesh have every element once."""
        for slot in self.gradients.slots:
            for first, last in slot.counted:
                own = slice(slot.offset + first - slot.covered[0], slot.offset + last - slot.covered[0])
                grad = slot.grad.view(-1)[first:last]
                yield slot.name, grad, self.moments["exp_avg"][own], self.moments["exp_avg_sq"][own]

    def shards(self) -> Iterator[tuple[str, str, tuple[int, int], Tensor]]:
        """This rank's part of the state: (kind, parameter name, range, values) for each of KINDS and every parameter.

        The range [first, last) counts elements of the rank's (tp-local) parameter, flattened; it is (0, 0) where this
        rank has none. The values [last - first] are views: write them and call `restored` to continue from others.
        """
        for kind, buffer in zip(KINDS, (self.master, *self.moments.values()), strict=True):
            for slot in self.gradients.slots:
                yield kind, slot.name, slot.covered, _of(slot, buffer)

    def restored(self, steps: int) -> None:
        """Go on from what `shards` shows, as of `steps` steps: parameters are written. Every dp rank must call it."""
        self._set_state(steps)
        self.copy_to_parameters()

    def _by_bucket(self, buffer: Tensor) -> Sequence[Tensor]:
        sizes = [len(shard) for shard in self.gradients.shards]
        return buffer.split(sizes) if sizes else ()


def _of(slot: Slot, buffer: Tensor) -> Tensor:
    """The part of a tensor of this rank's shards that is the slot's."""
    first, last = slot.covered
    return buffer[slot.offset : slot.offset + last - first]


def lr_scale(name: str, config: OptimizerConfig) -> float:
    """The learning-rate factor of a parameter: that of the first pattern its name matches, else 1."""
    return next((scale for pattern, scale in config.lr_scale.items() if fnmatchcase(name, pattern)), 1.0)


def freeze_unscaled(model: nn.Module, config: OptimizerConfig, names: Collection[str]) -> None:
    """Freeze the parameters whose learning-rate factor is 0.

    `names`: of the whole model's parameters, of which this rank may hold a part. Raises UserError for a pattern that
    matches none of them.
    """
    for pattern in config.lr_scale:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"optimizer.lr_scale pattern {pattern!r} matches no parameter; names are like {min(names)}")
    for name, parameter in model.named_parameters():
        if lr_scale(name, config) == 0:
            parameter.requires_grad_(False)
