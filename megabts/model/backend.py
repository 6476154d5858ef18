"""The layer library a model is built from: one short protocol of factories.

Every linear (the stitches' too), norm, embedding, head and attention core of a model comes from a `Backend`, so that
another library (Transformer Engine) is another implementation of this protocol with the same parameter names. A
backend carries the dtype and device of what it makes, the tensor-parallel axis, and whether hidden states outside the
tensor-parallel regions are split along the sequence over that axis (sequence parallelism, Korthikanti et al., arXiv
2205.05198): below, s' is s / tp where they are, else s. A library that has a norm in one kernel with what reads it
gives both from one factory, `norm_linear` or `norm_mlp`. Parameter names never depend on the backend.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta
from megabts.parallel.tensor import Vocabulary
from megabts.runtime.fusion import Fuse

Recompute = Literal["none", "selective", "full"]
"""What backward computes again: nothing; attention and the MLP's activation; whole layers."""


class Backend(Protocol):
    """Makes the parts of a model, in `dtype` on `device`, split over `tp`."""

    dtype: torch.dtype
    device: torch.device
    tp: Axis
    sequence: bool
    fuse: Fuse
    """How element-wise functions are called."""

    def column_linear(self, weight: ParamMeta, bias: ParamMeta | None = None, *, entered: bool = False) -> nn.Module:
        """Linear [s', b, in] -> [s, b, out / tp]; parameters `weight` [out, in] and, if asked for, `bias` [out].

        `entered`: its input [s, b, in] comes from `collectives.enter`, which its caller calls once for several linears.
        """
        ...

    def row_linear(self, weight: ParamMeta, *, left: bool = False) -> nn.Module:
        """Linear [s, b, in / tp] -> [s', b, out], summed over tp; parameter `weight` [out, in].

        `left`: its output [s, b, out] is this rank's part of the sum; its caller calls `collectives.leave` once for
        several linears.
        """
        ...

    def norm(self, size: int, eps: float, *, summed: bool = False) -> nn.Module:
        """RMSNorm over the last dimension; parameter `weight` [size].

        `summed`: what the ranks of tp norm differs (heads, or positions), so their weight gradients add up.
        """
        ...

    def split_norm(self, weight: ParamMeta, eps: float) -> nn.Module:
        """RMSNorm of [.., w / tp] over all w that the ranks of tp hold together; parameter `weight` [w]."""
        ...

    def norm_linear(
        self, size: int, eps: float, weight: ParamMeta, bias: ParamMeta | None = None
    ) -> tuple[nn.Module, nn.Module]:
        """(norm, column linear) of hidden states [s', b, size], to be applied one after the other and nothing between.

        Parameters as of `norm` and `column_linear`. Where one kernel does both, the first module only holds `weight`.
        """
        ...

    def norm_mlp(
        self, size: int, eps: float, gate_up: ParamMeta, down: ParamMeta, recompute: Recompute
    ) -> tuple[nn.Module, nn.Module]:
        """(norm, down(silu(gate) * up)) of hidden states [s', b, size]: SwiGLU (Shazeer, arXiv 2002.05202).

        Likewise to be applied one after the other. The second has parameters `gate_up.weight` [2 F, size], gate before
        up, and `down.weight` [size, F]; its activation is computed again in backward where `recompute` is selective.
        """
        ...

    def mlp(self, gate_up: ParamMeta, down: ParamMeta, recompute: Recompute) -> nn.Module:
        """The feed-forward of `norm_mlp` without a norm, of hidden states [s', b, size]."""
        ...

    def vocabulary(self, vocab_size: int, hidden_size: int, std: float) -> Vocabulary:
        """Embedding [s, b] -> [s', b, D], or head of [s', b, D], split by vocabulary; parameter `weight` [V, D]."""
        ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Scaled dot-product attention; causal when `mask` is None, the queries being the last s of t positions.

        query [s, b, heads, hd]; key, value [t, b, kv_heads, hd]; mask bool [b or 1, 1, s, t], true where attention is
        allowed (somewhere for every query). Returns [s, b, heads * hd].
        """
        ...

    def frozen(self) -> "Backend":
        """The backend of parts that will never train; a library may keep their weights in fewer bits."""
        ...

    def checkpoint(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """function(*args), of which nothing is kept: backward computes it again."""
        ...

    def forward_context(self, rows: int) -> AbstractContextManager[None]:
        """Open around a forward pass through parts of this backend, on `rows` = s' b positions; it may be nested.

        FP8 lives in it: no module may run twice in one such region, and scales move on at its end.
        """
        ...
