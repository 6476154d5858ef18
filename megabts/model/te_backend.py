"""Decoder parts of NVIDIA's Transformer Engine (TE; written against 2.12): norm, linear and MLP fused, and FP8.

TE's modules have their own names for parameters, and one module holds a norm and a linear. So they are kept out of the
module tree (in a tuple, which `nn.Module` does not look into), and small modules hold the same `nn.Parameter`s under
this project's names: names, shapes and metas are those of the torch backend. TE's modules stay in training mode, which
nothing but recomputation reads there.

TE's orders are ours: SwiGLU's gate is the first half of the rows of `gate_up` (TE docs, `ops.SwiGLU`), and attention
takes queries, keys and values as separate tensors. Embedding and head are the torch backend's.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megabts.errors import UsageError, UserError
from megabts.model.backend import Recompute
from megabts.model.te_fp8 import FP8, FP8_MULTIPLE, in_fp8, make_recipe
from megabts.model.torch_backend import MLP, TorchBackend
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta
from megabts.parallel.tensor import check_columns
from megabts.runtime.device import load_te
from megabts.runtime.fusion import Fuse, eager


class TEBackend(TorchBackend):
    """`Backend` of Transformer Engine.

    fp8: how the linears' FP8 products are scaled; amax_group: the ranks that share delayed scaling's factors
    (`te_fp8.amax_group`). Raises UserError where TE is missing or the GPU lacks FP8.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        tp: Axis,
        sequence: bool = False,
        fp8: FP8 = "none",
        amax_group: ProcessGroup | None = None,
        fuse: Fuse = eager,
        frozen: torch.dtype | None = None,
    ) -> None:
        super().__init__(dtype, device, tp, sequence, fuse, fp8, frozen)
        self.te = load_te()
        self.recipe = make_recipe(fp8, reduce_amax=amax_group is not None)
        self.amax_group = amax_group
        self._cores: dict[tuple[int, int, int], nn.Module] = {}  # attention, by its heads; without parameters
        if fp8 != "none":
            probe = self.te.is_fp8_block_scaling_available if fp8 == "block" else self.te.is_fp8_available
            available, reason = probe(return_reason=True)
            if not available:
                raise UserError(f"precision.fp8 {fp8} does not run on this GPU: {reason} Set precision.fp8 none")

    def frozen(self) -> "TEBackend":
        """See `Backend`. Under current scaling the weights are kept in FP8 alone, quantised when they are loaded.

        Block scaling lacks a way back to bfloat16 in TE's MLP, and delayed scaling knows no scale when it loads.
        """
        other = copy(self)
        other.dtype = self.frozen_dtype
        other.quantised = self.fp8 == "current"
        return other

    def column_linear(self, weight: ParamMeta, bias: ParamMeta | None = None, *, entered: bool = False) -> nn.Module:
        """See `Backend`."""
        rows, columns = weight.local_shape(self.tp)
        if entered:
            inner = self._build("Linear", columns, rows, bias=bias is not None)
        else:  # TE divides the rows it is given, and knows no rows that several ranks hold
            inner = self._build(
                "Linear", columns, rows * self.tp.size, bias=bias is not None, parallel_mode="column", **self._split()
            )
        return _linear(inner, weight, bias)

    def row_linear(self, weight: ParamMeta, *, left: bool = False) -> nn.Module:
        """See `Backend`."""
        if left:
            return super().row_linear(weight, left=True)
        check_columns(weight, self.tp)
        inner = self._build(
            "Linear", weight.shape[1], weight.shape[0], bias=False, parallel_mode="row", **self._split()
        )
        return _linear(inner, weight)

    def norm(self, size: int, eps: float, *, summed: bool = False) -> nn.Module:
        """See `Backend`."""
        inner = self.te.RMSNorm(size, eps=eps, dtype=self.dtype, device=self.device)
        return Applied(inner, _norm_meta(size, summed), {"weight": inner.weight})

    def norm_linear(
        self, size: int, eps: float, weight: ParamMeta, bias: ParamMeta | None = None
    ) -> tuple[nn.Module, nn.Module]:
        """See `Backend`."""
        rows = weight.local_shape(self.tp)[0] * self.tp.size
        inner = self._build(
            "LayerNormLinear",
            size,
            rows,
            eps=eps,
            bias=bias is not None,
            normalization="RMSNorm",
            parallel_mode="column",
            **self._split(),
        )
        return self._norm_of(inner, size), _linear(inner, weight, bias)

    def norm_mlp(
        self, size: int, eps: float, gate_up: ParamMeta, down: ParamMeta, recompute: Recompute
    ) -> tuple[nn.Module, nn.Module]:
        """See `Backend`. TE's MLP can only compute all of itself but `down` again; selective is two modules instead."""
        if recompute == "selective":
            norm, column = self.norm_linear(size, eps, gate_up)
            return norm, MLP(column, self.row_linear(down), recompute, self.fuse)
        check_columns(down, self.tp)
        inner = self._build(
            "LayerNormMLP",
            size,
            down.shape[1],
            eps=eps,
            bias=False,
            normalization="RMSNorm",
            activation="swiglu",
            set_parallel_mode=True,
            **self._split(),
        )
        return self._norm_of(inner, size), FusedMLP(inner, gate_up, down)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """See `Backend`. TE has no fast kernel for masks of any form (packed documents) and none is needed for the few
        queries of generation: there it is torch's. Never in FP8."""
        if mask is not None or query.shape[0] != key.shape[0]:
            return super().attention(query, key, value, mask)
        heads = query.shape[2], key.shape[2], query.shape[3]
        if heads not in self._cores:
            self._cores[heads] = self.te.DotProductAttention(
                heads[0], heads[2], num_gqa_groups=heads[1], qkv_format="sbhd", attn_mask_type="causal"
            )
        with self.te.autocast(enabled=False) if in_fp8() else nullcontext():
            out: Tensor = self._cores[heads](query, key, value)
        return out

    def checkpoint(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """See `Backend`. Under FP8 TE's own, which computes again with the scales of the first time."""
        if self.recipe is None:
            return super().checkpoint(function, *args)
        if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function(*args)  # TE would keep scales for a second time that may never come
        out: Tensor = self.te.checkpoint(function, *args, use_reentrant=False)
        return out

    def forward_context(self, rows: int) -> AbstractContextManager[None]:
        """See `Backend`. Matrices that FP8 products cannot have are multiplied in `dtype`: prompts of any length, and
        single tokens. Raises UsageError for them in training."""
        if self.recipe is None or in_fp8():
            return nullcontext()
        if rows % FP8_MULTIPLE == 0:
            context: AbstractContextManager[None] = self.te.autocast(
                enabled=True, recipe=self.recipe, amax_reduction_group=self.amax_group
            )
            return context
        if torch.is_grad_enabled():
            raise UsageError(
                f"precision.fp8 {self.fp8} needs micro-batches of a multiple of {FP8_MULTIPLE} tokens on every rank; "
                f"these have {rows}; change train.micro_batch or data.seq_length"
            )
        return nullcontext()

    def _split(self) -> dict[str, Any]:
        return {"tp_group": self.tp.group, "tp_size": self.tp.size, "sequence_parallel": self.sequence}

    def _build(self, kind: str, *sizes: int, **settings: Any) -> nn.Module:
        with ExitStack() as stack:
            if self.quantised:
                # without autograd TE leaves out the transposed copy, and makes it where a backward comes to need it
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.te.quantized_model_init(enabled=True, recipe=self.recipe))
            made: nn.Module = getattr(self.te, kind)(*sizes, params_dtype=self.dtype, device=self.device, **settings)
        return made

    def _norm_of(self, inner: nn.Module, size: int) -> nn.Module:
        return Holder(_norm_meta(size, self.sequence), {"weight": inner.layer_norm_weight})


class Holder(nn.Module):
    """Parameters, by this project's names, of a TE module that another module applies; hands its input on."""

    def __init__(self, metas: Mapping[str, ParamMeta], parameters: Mapping[str, Tensor | nn.Module]) -> None:
        super().__init__()
        self.metas = dict(metas)
        for name in metas:
            parameter = parameters[name]
            assert isinstance(parameter, nn.Parameter)
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Unchanged."""
        return x


class Applied(Holder):
    """A Holder that applies its TE module, `inner[0]`."""

    def __init__(
        self, inner: nn.Module, metas: Mapping[str, ParamMeta], parameters: Mapping[str, Tensor | nn.Module]
    ) -> None:
        super().__init__(metas, parameters)
        self.inner = (inner,)

    def forward(self, x: Tensor) -> Tensor:
        """What the TE module makes of it."""
        return _apply(self.inner[0], x)


class FusedMLP(nn.Module):
    """TE's LayerNormMLP, `inner[0]`, with its matrices as `gate_up.weight` and `down.weight`."""

    def __init__(self, inner: nn.Module, gate_up: ParamMeta, down: ParamMeta) -> None:
        super().__init__()
        self.inner = (inner,)
        self.gate_up = Holder({"weight": gate_up}, {"weight": inner.fc1_weight})
        self.down = Holder({"weight": down}, {"weight": inner.fc2_weight})

    def forward(self, hidden: Tensor) -> Tensor:
        """[s or s / tp, b, D], not yet normed -> the same."""
        return _apply(self.inner[0], hidden)


def _norm_meta(size: int, summed: bool) -> dict[str, ParamMeta]:
    return {"weight": ParamMeta((size,), "constant", 1.0, summed=summed)}


def _linear(inner: nn.Module, weight: ParamMeta, bias: ParamMeta | None = None) -> nn.Module:
    metas = {"weight": weight} | ({"bias": bias} if bias else {})
    return Applied(inner, metas, {name: getattr(inner, name) for name in metas})


def _apply(inner: nn.Module, x: Tensor) -> Tensor:
    """Without autograd where nothing needs it: TE would keep tensors, and its RMSNorm MLP fails on frozen weights."""
    needed = x.requires_grad or any(parameter.requires_grad for parameter in inner.parameters())
    with torch.set_grad_enabled(needed and torch.is_grad_enabled()):
        out: Tensor = inner(x)
    return out
