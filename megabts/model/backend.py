"""The layer library a model is built from: one short protocol of factories.

Every linear (the stitches' too), norm, embedding, head and attention core of a model comes from a `Backend`, so that
another library (Transformer Engine) is another implementation of this protocol with the same parameter names. A
backend carries the dtype and device of what it makes, and the tensor-parallel axis.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta
from megabts.parallel.tensor import Vocabulary


class Backend(Protocol):
    """Makes the parts of a model, in `dtype` on `device`, split over `tp`."""

    dtype: torch.dtype
    device: torch.device
    tp: Axis

    def column_linear(self, weight: ParamMeta, bias: ParamMeta | None = None) -> nn.Module:
        """Linear [.., in] -> [.., out / tp]; parameters `weight` [out, in] and, if asked for, `bias` [out]."""
        ...

    def row_linear(self, weight: ParamMeta) -> nn.Module:
        """Linear [.., in / tp] -> [.., out], summed over tp; parameter `weight` [out, in]."""
        ...

    def norm(self, size: int, eps: float) -> nn.Module:
        """RMSNorm over the last dimension; parameter `weight` [size]."""
        ...

    def vocabulary(self, vocab_size: int, hidden_size: int, std: float) -> Vocabulary:
        """Embedding or head, split by vocabulary; parameter `weight` [V, D]."""
        ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Scaled dot-product attention; causal when `mask` is None, the queries being the last s of t positions.

        query [s, b, heads, hd]; key, value [t, b, kv_heads, hd]; mask bool [b or 1, 1, s, t], true where attention is
        allowed (somewhere for every query). Returns [s, b, heads * hd].
        """
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [.., gate | up] (Shazeer, arXiv 2002.05202): [.., 2F] -> [.., F]."""
        ...
