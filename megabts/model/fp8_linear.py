"""FP8 products of linears that never train, with torch alone: y = x W^T, and of its gradients dX = dY W.

Both operands are rounded to 8 bits, E4M3 (x, W) or E5M2 (dY; Micikevicius et al., arXiv 2209.05433), after a scaling
that brings the tensor's largest value to the format's end (current scaling). A weight is rounded once, when values are
copied into it, and kept in FP8 alone; x and dY at every call. `torch._scaled_mm` sums in fp32 and scales back.

A matrix has one scale. One for each output row would be no use to dX, which sums over the rows, and its kernels on
Hopper are slower and want the same of x. Nor is it needed: E4M3 is a float, and keeps all its bits of numbers down to
2^-14 of the largest. Over tp a rank scales its slices of x, W and dY by themselves.

Tensor cores read both operands along the dimension that is summed over, so dX needs a transposed copy of W. It is made
when a gradient first comes: layers that only run forward keep 1 byte a parameter, others 2.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from megabts.errors import UsageError
from megabts.model.backend import Backend
from megabts.model.te_fp8 import FP8_MULTIPLE
from megabts.parallel.collectives import enter, leave
from megabts.parallel.sharding import ParamMeta
from megabts.parallel.tensor import check_columns
from megabts.runtime.fusion import Fuse

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-30
"""The least that a tensor's largest value counts as: zeros have a scale, too."""


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in FP8, scale): the largest |x| becomes the format's largest number. NaN and infinity make all NaN."""
    scale = x.abs().amax().float().clamp(min=SMALLEST) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


class Rounded:
    """A matrix [out, in] in E4M3: values x scale."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.values = torch.zeros(shape, dtype=E4M3, device=device)
        self.scale = torch.ones((), device=device)
        self.turned: Tensor | None = None

    def set(self, values: Tensor, scale: Tensor) -> None:
        """Take these, and forget the transposed copy of what was there."""
        self.values.copy_(values)
        self.scale.copy_(scale)
        self.turned = None

    def transposed(self) -> Tensor:
        """The values as [in, out], contiguous; made by the first call."""
        if self.turned is None:
            self.turned = self.values.t().contiguous()
        return self.turned


class FP8Weight(Tensor):
    """A weight [out, in] that is kept in FP8: `copy_` into it rounds, whatever reads it gets values in its dtype.

    So loading, names and shapes are those of any parameter. Nothing else may change it.
    """

    rounded: Rounded
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, rounded: Rounded, dtype: torch.dtype) -> "FP8Weight":
        """A view of `rounded` that reads as `dtype`."""
        made: FP8Weight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, rounded.values.shape, dtype=dtype, device=rounded.values.device
        )
        made.rounded = rounded
        return made

    def exact(self) -> Tensor:
        """What the 8-bit values stand for, in the weight's dtype."""
        return (self.rounded.values.float() * self.rounded.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Every operator that reaches the weight."""
        if function is torch.ops.aten.detach.default:
            return cls(args[0].rounded, args[0].dtype)
        if function is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            target, source = args[0], args[1]
            if isinstance(source, cls):
                target.rounded.set(source.rounded.values, source.rounded.scale)
            else:
                target.rounded.set(*quantise(source.to(target.device), E4M3))
            return target
        assert not (function._schema.is_mutable and isinstance(args[0], cls)), f"{function} of a frozen FP8 weight"
        args, kwargs = tree_map(lambda x: x.exact() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


class FP8Linear(nn.Module):
    """A frozen linear whose weight [out, in] is an `FP8Weight`; see `parallel.tensor` for how tp splits it.

    enters: its input comes into the tensor-parallel region here (`ColumnLinear`); leaves: its output leaves it
    (`RowLinear`). Rows that FP8 products cannot have (prompts, single tokens) are multiplied in the working dtype;
    `forward` raises UsageError for them in training.
    """

    def __init__(
        self,
        backend: Backend,
        weight: ParamMeta,
        bias: ParamMeta | None = None,
        *,
        enters: bool = False,
        leaves: bool = False,
    ) -> None:
        super().__init__()
        if leaves:
            check_columns(weight, backend.tp)
        shape = weight.local_shape(backend.tp)
        assert not any(size % FP8_MULTIPLE for size in shape), f"FP8 has no {shape}; parallel.layout refuses it"
        self.tp, self.sequence, self.fuse = backend.tp, backend.sequence, backend.fuse
        self.enters, self.leaves = enters, leaves
        self.metas = {"weight": weight} | ({"bias": bias} if bias else {})
        held = FP8Weight(Rounded(shape, backend.device), backend.dtype)
        self.weight = nn.Parameter(held, requires_grad=False)
        self.bias = None
        if bias:
            values = torch.empty(bias.local_shape(backend.tp), dtype=backend.dtype, device=backend.device)
            self.bias = nn.Parameter(values, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[s', b, in] if it enters, else [s, b, in / tp or in] -> [s', b, out] if it leaves, else [s, b, out / tp]."""
        if self.enters:
            x = enter(x, self.tp, self.sequence)
        out = self._product(x)
        if self.bias is not None:  # not in the product, which has none in fp32
            out = out + self.bias
        return leave(out, self.tp, self.sequence) if self.leaves else out

    def _product(self, x: Tensor) -> Tensor:
        weight, rows = self.weight, x.shape[:-1].numel()
        assert isinstance(weight, FP8Weight)
        if rows % FP8_MULTIPLE == 0:
            out: Tensor = _Product.apply(x, weight.rounded, self.fuse)
            return out
        if torch.is_grad_enabled():
            raise UsageError(
                f"precision.fp8 current needs micro-batches of a multiple of {FP8_MULTIPLE} tokens; these have {rows}; "
                "change train.micro_batch or data.seq_length"
            )
        return F.linear(x, weight.exact())


class _Product(torch.autograd.Function):
    """x [.., in] W^T -> [.., out]; keeps nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Rounded, fuse: Fuse) -> Tensor:
        ctx.weight, ctx.fuse = weight, fuse
        return _multiply(x, E4M3, weight.values, weight.scale, fuse, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight = ctx.weight
        return _multiply(grad, E5M2, weight.transposed(), weight.scale, ctx.fuse, fast=False), None, None


def _multiply(x: Tensor, kind: torch.dtype, matrix: Tensor, scale: Tensor, fuse: Fuse, *, fast: bool) -> Tensor:
    """x [.., k] times the transpose of `matrix` [n, k]; x is rounded to `kind` first.

    fast: Hopper's tensor cores may sum in fewer bits than fp32, which is enough forward and not for gradients (as
    Transformer Engine's recipes have it).
    """
    rounding: Callable[..., tuple[Tensor, Tensor]] = fuse(quantise)
    values, own = rounding(x.flatten(0, -2), kind)
    out = torch._scaled_mm(
        values.contiguous(), matrix.t(), scale_a=own, scale_b=scale, out_dtype=x.dtype, use_fast_accum=fast
    )
    return out.view(*x.shape[:-1], -1)
