"""A decode step of members side by side: what one token needs of every layer, for all members in one operator each.

A step of a small model is calls of operators, not arithmetic, and n members called one after another make n times as
many. Here members of one shape are a dimension of every tensor: their weights stand behind each other in memory and
one batched product reads them all, and their heads are heads of one attention. It is the function of
`megabts.model.layer` without what training needs; a dense model is one member.

`OneToken.of` says which models can: whole decoders of the torch backend, on one rank, with weights of their own, whose
feed-forwards are not routed. The others run layer by layer, as prompts and training do.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabts.bts.model import BTSModel
from megabts.bts.placement import Exchanges
from megabts.bts.stitch import Stitch
from megabts.inference.kv_cache import KVCache
from megabts.model.attention import Context
from megabts.model.decoder import Decoder, Model
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.tensor import ColumnLinear

_ROWS = 8
"""From so many rows on, or in 16 bits, weights x states is faster than states x weights, for MKL and oneDNN."""


class OneToken:
    """All layers of a dense or a stitched model, for one token a row. The model's parameters become views of stacks."""

    @classmethod
    def of(cls, model: Model) -> "OneToken | None":
        """For the model; None where it is not of a kind that can."""
        decoders: list[Any] = []
        if isinstance(model, BTSModel) and model.placement.ep.size == 1:
            decoders = list(model.members.values())
        elif isinstance(model, Decoder):
            decoders = [model]
        if not decoders or type(decoders[0].backend) is not TorchBackend or decoders[0].backend.tp.size > 1:
            return None
        if decoders[0].backend.quantised:  # as a run trains them
            return None
        if decoders[0].backend.device.type == "meta":  # made of another model's tensors: they are not stacked anew
            return None
        if decoders[0].many_attentions or any(layer.routed for layer in decoders[0].layers.values()):
            return None
        assert isinstance(model, Decoder | BTSModel)
        return cls(model, decoders)

    def __init__(self, model: Decoder | BTSModel, decoders: Sequence[Decoder]) -> None:
        self.model = model
        self.config = model.config
        self.layers = [
            _Layer([decoder.layers[str(index)] for decoder in decoders]) for index in range(model.config.num_layers)
        ]
        stitches = model.stitches.values() if isinstance(model, BTSModel) else ()
        self.stitches = [_Stitch.of(stitch, model.dtype) for stitch in stitches]  # type: ignore[arg-type]
        self.final_norm = _vectors([decoders[0].final_norm.weight])  # type: ignore[list-item]
        self.head = _stack([decoders[0].head.weight])
        self._eps = torch.tensor(model.config.norm_eps, device=decoders[0].backend.device)

    @property
    def recordable(self) -> bool:
        """Whether a step is operators on tensors that stay where they are, and no more: nobody looks at gates, nothing
        is remembered of the texts beside the caches."""
        model = self.model
        return not isinstance(model, BTSModel) or not (model.observed or model.mixes)

    def run_layers(self, hidden: Tensor, context: Context, cache: KVCache) -> Tensor:
        """All layers, and the stitches between them, on what `Model.embed` gave; `cache`: of all members together."""
        model = self.model
        cos, sin = (part[0] for part in context.rope)  # [b or 1, 1, hd / 2]
        rope = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        if not isinstance(model, BTSModel):
            return self._run(0, self.config.num_layers, hidden, rope, context, cache)
        exchanges, begin, states = Exchanges(model.placement.ep), 0, hidden.squeeze(1)
        for index, point in enumerate(model.plan):
            states = self._run(begin, point.after, states, rope, context, cache)
            fast = None if model.observed else self.stitches[index]
            if fast is not None:
                states = fast(states, last=point.after == self.config.num_layers and not model.mixes)
            else:
                states = torch.cat(model.stitch(index, list(states.unsqueeze(1).unbind(0)), context, exchanges))
            begin = point.after
        return states.unsqueeze(1)

    def logits(self, hidden: Tensor, context: Context) -> Tensor:
        """What `Model.logits` gives of these states, [b, 1, V]."""
        model = self.model
        if isinstance(model, BTSModel) and model.mixes:
            return model.logits(hidden, context, last=True)
        normed = self._norm(hidden.view(1, hidden.shape[-2], -1), self.final_norm)
        return _linear(normed, self.head).transpose(0, 1)

    def _run(
        self, first: int, last: int, hidden: Tensor, rope: tuple[Tensor, Tensor], context: Context, cache: KVCache
    ) -> Tensor:
        """Layers [first, last) on [members, b, D]."""
        for index in range(first, last):
            layer = self.layers[index]
            if layer.post:
                hidden = hidden + self._norm(self._attend(index, hidden, rope, context, cache), layer.attention_norm)
                hidden = hidden + self._norm(_feed_forward(layer, hidden), layer.mlp_norm)
            else:
                read = self._norm(hidden, layer.attention_norm)
                hidden = hidden + self._attend(index, read, rope, context, cache)
                hidden = hidden + _feed_forward(layer, self._norm(hidden, layer.mlp_norm))
        return hidden

    def _attend(
        self, index: int, hidden: Tensor, rope: tuple[Tensor, Tensor], context: Context, cache: KVCache
    ) -> Tensor:
        layer, (num_query, num_key, num_value) = self.layers[index], self.config.qkv_heads
        members, b, _ = hidden.shape
        heads = _linear(hidden, layer.qkv, layer.bias).view(members, b, -1, self.config.head_dim)
        if layer.q_norm is None or layer.k_norm is None:
            turned, value = heads.split_with_sizes([num_query + num_key, num_value], 2)
            query, key = _rotate(turned, rope).split_with_sizes([num_query, num_key], 2)
        else:
            query, key, value = heads.split_with_sizes([num_query, num_key, num_value], 2)
            query = _rotate(self._norm_heads(query, layer.q_norm), rope)
            key = _rotate(self._norm_heads(key, layer.k_norm), rope)
        new = (part.transpose(0, 1).reshape(1, b, members * num_key, -1) for part in (key, value))
        key, value = (part.permute(1, 2, 0, 3) for part in cache.append(index, *new))
        # the query heads of one key head stand as its queries, and members' heads behind each other
        query = query.transpose(0, 1).reshape(b, members * num_key, num_query // num_key, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=context.mask)
        return _linear(mixed.view(b, members, -1).transpose(0, 1), layer.out)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of [members, b, size] with weights [members, 1, size], in fp32."""
        exact = x if x.dtype == torch.float64 else x.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (exact * scale).to(x.dtype).mul_(weight)

    def _norm_heads(self, heads: Tensor, weight: Tensor) -> Tensor:
        """Of [members, b, heads, hd]: each head, or all of a position together, as the weight's width says."""
        if weight.shape[-1] == heads.shape[-1]:
            return self._norm(heads, weight.unsqueeze(1))
        return self._norm(heads.flatten(2), weight).view(heads.shape)


class _Layer:
    """The weights of one layer of all members, [members, ..]; vectors are [members, 1, size]."""

    def __init__(self, layers: Sequence[Any]) -> None:
        attention = layers[0].attention
        self.post: bool = layers[0].post
        self.attention_norm = _vectors([layer.attention_norm.weight for layer in layers])
        self.qkv = _stack([layer.attention.qkv.weight for layer in layers])
        self.bias = None if attention.qkv.bias is None else _vectors([layer.attention.qkv.bias for layer in layers])
        self.q_norm: Tensor | None = None
        self.k_norm: Tensor | None = None
        if attention.qk_norm:
            self.q_norm = _vectors([layer.attention.q_norm.weight for layer in layers])
            self.k_norm = _vectors([layer.attention.k_norm.weight for layer in layers])
        self.out = _stack([layer.attention.out.weight for layer in layers])
        self.mlp_norm = _vectors([layer.mlp_norm.weight for layer in layers])
        self.gate_up = _stack([layer.mlp.gate_up.weight for layer in layers])
        self.down = _stack([layer.mlp.down.weight for layer in layers])


class _Stitch:
    """A stitch layer whose matrices are full: all its gates are one product, its projections another."""

    @classmethod
    def of(cls, stitch: Stitch, dtype: torch.dtype) -> "_Stitch | None":
        """For the layer; None where a matrix has another form, or another dtype than the states'."""
        matrices = [*stitch.projections.values(), *stitch.gates.values()]
        full = all(isinstance(matrix, ColumnLinear) and matrix.weight.dtype == dtype for matrix in matrices)
        return cls(stitch) if full and len(stitch.projections) else None

    def __init__(self, stitch: Stitch) -> None:
        self.stitch = stitch
        self.projections, self.gates = (
            _stack([matrix.weight for matrix in matrices.values()])  # type: ignore[misc]
            for matrices in (stitch.projections, stitch.gates)
        )

    def __call__(self, states: Tensor, *, last: bool) -> Tensor:
        """[members, b, D] -> the same, or the hub's alone, [1, b, D], after the `last`; see `Stitch`."""
        stitch, hub, experts = self.stitch, states[:1], states[1:]
        logits = _linears(F.rms_norm(hub, hub.shape[-1:]) if stitch.normalised else hub, self.gates)
        if stitch.kind == "hub_into_experts":
            return torch.cat([hub, torch.lerp(experts, _linears(hub, self.projections), logits.sigmoid())])
        projected = _linear(experts, self.projections)
        if stitch.hub_bias is not None:
            logits[0] += stitch.hub_bias
        gates = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)
        mixed = (gates * torch.cat([hub, projected])).sum(0, keepdim=True).to(hub.dtype)
        if stitch.mix is not None:
            mixed = torch.lerp(hub, mixed, stitch.mix)
        if last:
            return mixed
        return torch.cat([mixed, experts if stitch.expert_stream == "unchanged" else projected])


@torch.no_grad()
def _stack(parameters: Sequence[nn.Parameter]) -> Tensor:
    """[members, ..] of which the parameters are views from now on: nothing is kept twice."""
    first = parameters[0].detach()
    size = first.numel() * first.element_size()
    if all(p.is_contiguous() and p.data_ptr() == first.data_ptr() + i * size for i, p in enumerate(parameters)) and (
        len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    ):
        return first.as_strided((len(parameters), *first.shape), (first.numel(), *first.stride()))
    with torch.inference_mode(False):  # they may be trained, or read by what is, later
        stacked = torch.stack([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, stacked.unbind(0), strict=True):
        parameter.data = part
    return stacked


def _vectors(parameters: Sequence[nn.Parameter]) -> Tensor:
    return _stack(parameters).unsqueeze(1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [members, b, in], weight [members, out, in] -> [members, b, out]."""
    if x.shape[1] >= _ROWS or x.dtype.itemsize == 2:
        out = torch.bmm(weight, x.transpose(1, 2)).transpose(1, 2).contiguous()
    else:
        out = torch.bmm(x, weight.transpose(1, 2))
    return out if bias is None else out + bias


def _linears(x: Tensor, weight: Tensor) -> Tensor:
    """One x [1, b, in] by several weights [n, out, in] -> [n, b, out]."""
    out = _linear(x, weight.flatten(0, 1).unsqueeze(0))
    return out.view(x.shape[1], len(weight), -1).transpose(0, 1)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Heads [members, b, heads, hd] by cos, and by sin with the first half negative, each [b or 1, 1, hd]."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _feed_forward(layer: _Layer, hidden: Tensor) -> Tensor:
    gate, up = _linear(hidden, layer.gate_up).chunk(2, -1)
    return _linear(F.silu(gate).mul_(up), layer.down)
