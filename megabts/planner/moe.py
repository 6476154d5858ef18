"""A MoE model's parts on one rank (BTX, arXiv 2403.07816; BAM, arXiv 2408.08274; sparse upcycling; BAM's adapters).

Parameters are those of real modules. What a layer keeps, in elements per position (as in `planner.decoder`, with N ffn
experts of width W of which a token runs through k, n attention experts, M 1 where their weights train; the region of
tensor parallelism is entered once for all of them, so what they read is whole under sequence parallelism, too):

    router            D in fp32, the router's input; probabilities, choices and orders of N, k numbers
    attention         norm sigma D; n of what one keeps; n D outputs, which the router's gradient needs; in bf16 M D,
                      the input in that type
    feed-forward      norm sigma D; k M D copies on their way out, 2 k W / tp, k M W / tp, k D outputs
    soft routing      the same with k = N, but ep M D copies, and in bf16 M D on one rank (in fp32 the router's)
    adapters          n D / tp and k D / tp, their inputs

ffn experts are spread over ep, whose ranks have tokens of their own: k (P - 1) / P hidden states of a rank's positions
go out and as many come home, of soft routing P - 1. Tokens are taken to be spread evenly. Before the first layer's
adapters and routers nothing trains, so its attention experts keep nothing and get no gradient.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig
from megabts.errors import UsageError
from megabts.model.torch_backend import TorchBackend
from megabts.moe.model import MoEModel
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import named_metas
from megabts.planner.decoder import (
    ADD_BYTES,
    NORM_BYTES,
    ROTATE_BYTES,
    SWIGLU_BYTES,
    attention_kept,
    embedding_work,
    head_widths,
    head_work,
    tensor_bytes,
    vocabulary_elements,
)
from megabts.planner.work import Parts, Work, rows, slice_share, state_bytes, value_bytes

ESTIMATES: dict[str, dict[str, object]] = {
    "btx-soft": {"routing": "soft"},
    "btx-top2": {"routing": "topk", "top_k": 2},
    "btx-sample": {"routing": "sample"},
    "bam": {"routing": "topk", "top_k": 2, "attention_experts": True},
}
"""What the members of a BTS run may be planned as, and the settings of `moe` that are meant."""


def moe_of_members(config: RunConfig, name: str) -> RunConfig:
    """The MoE run of a BTS run's members, in form `name` of `ESTIMATES`. Raises UsageError for other names and runs."""
    if name not in ESTIMATES:
        raise UsageError(f"--as {name} is unknown; use one of {', '.join(ESTIMATES)}")
    if config.method != "bts" or not config.bts.experts:
        raise UsageError(
            f"--as {name} plans another use of the members of a bts run; this run's method is {config.method}, with "
            f"{len(config.bts.experts)} bts.experts"
        )
    moe = MoEConfig(members=dict.fromkeys(config.bts.members, ""), **ESTIMATES[name])  # type: ignore[arg-type]
    return replace(config, method="moe", moe=moe)


def moe_parts(config: RunConfig, ep_rank: int = 0) -> Parts:
    """What a rank holds and does; all expert-parallel ranks are alike."""
    model, trains = config.model, not config.moe.adapters
    first, later = _layer(config, 0), _layer(config, 1)
    largest = max(_parameters(config).largest, trains * vocabulary_elements(config))
    return Parts(
        embedding_work(config, trains=trains),
        (first, *[later] * (model.num_layers - 1)),
        head_work(config, trains=trains, passes=True),
        vocabulary_elements(config) if model.tie_embeddings else 0,
        largest,
    )


@dataclass(frozen=True)
class _Parameters:
    """Elements of a real layer's parameters on one rank."""

    held: int
    trainable: int
    spread: int
    """Of the trainable ones, those that other expert-parallel ranks have not."""
    largest: int
    """Of one trainable parameter."""


def _parameters(config: RunConfig) -> _Parameters:
    model = replace(config.model, preset="", num_layers=1, vocab_size=config.parallel.tensor)
    return _count(_Key(model, config.moe), config.parallel.tensor, config.parallel.expert)


@dataclass(frozen=True)
class _Key:
    """A model's settings as a key of a cache."""

    model: ModelConfig
    moe: MoEConfig

    def __hash__(self) -> int:
        return hash((repr(self.model), repr(self.moe)))


@cache
def _count(key: _Key, tp: int, ep: int) -> _Parameters:
    library = TorchBackend(torch.float32, "meta", Axis("tp", tp))
    model = MoEModel(key.model, key.moe, library, experts=Axis("experts", ep))
    found = [(parameter, meta) for name, parameter, meta in named_metas(model) if name.startswith("layers.")]
    trained = [(parameter.numel(), meta.held is not None) for parameter, meta in found if parameter.requires_grad]
    return _Parameters(
        sum(parameter.numel() for parameter, _ in found),
        sum(count for count, _ in trained),
        sum(count for count, spread in trained if spread),
        max(count for count, _ in trained),
    )


def _layer(config: RunConfig, layer: int) -> Work:
    """One layer; without adapters all are alike but for their routing."""
    passes = layer > 0 or not config.moe.adapters
    count, state = _parameters(config), state_bytes(config)
    attention = _attention(config, config.train.recompute, passes=passes)
    ffn = _feed_forward(config, config.train.recompute, layer)
    found = Work(parameters=count.held, trainable=count.trainable, spread=count.spread, entry=state * passes)
    found = found + attention + ffn
    if config.train.recompute != "full":
        return found
    none = _attention(config, "none", passes=passes) + _feed_forward(config, "none", layer)
    again, half = attention.tensor[0], tensor_bytes(config, config.model.hidden_size) / 2
    # Recomputation ends before the layer's last sum.
    again += ffn.tensor[0] - (1 if config.parallel.sequence else 2) * half
    return replace(
        found,
        kept=state,
        working=found.working + none.kept,
        moved=(found.moved[0], found.moved[1] + found.moved[0]),
        tensor=(found.tensor[0], found.tensor[1] + again),
        expert=(found.expert[0], found.expert[1] + found.expert[0]),
    )


def _attention(config: RunConfig, recompute: str, *, passes: bool) -> Work:
    """Norm and attention, or attention experts; `passes`: their input needs a gradient."""
    moe, d, tp, value = config.moe, config.model.hidden_size, config.parallel.tensor, value_bytes(config)
    everywhere, share, sequence = rows(config), slice_share(config), config.parallel.sequence
    n, trains = (len(moe.members) if moe.attention_experts else 1), not moe.adapters
    backward = passes or trains
    elements, scales = attention_kept(config, trains=trains, recompute=recompute)
    kept = n * backward * (elements * value + scales) + passes * share * (d * value + 4)
    half, (query, key) = tensor_bytes(config, d) / 2, head_widths(config)
    forward, back = 2 * half, (1 + passes if sequence else 2 * passes) * half
    norm, add, turned = share * d, share * d, n * (query + key)
    fixed = 0.0
    if moe.attention_experts:
        kept += d * (4 + trains * (2 if value == 2 else 0)) + n * (d * value + 4 + (2 if value == 2 else 0))
        fixed = n * d * 4.0 if value == 2 and passes else 0.0  # the router's weights in fp32
        add += n * d
    else:
        kept += share * d * value
        back += sequence * half  # the projection's input is gathered again
    if moe.adapters:
        kept += n * d / tp * value
        forward += n * half
        back += n * backward * half
    moved = [
        everywhere * value / 2 * (norm * per_norm + add * per_add + turned * per_turn)
        for per_norm, per_add, per_turn in zip(NORM_BYTES, ADD_BYTES, ROTATE_BYTES, strict=True)
    ]
    again = everywhere * 2 * config.data.seq_length * query * n if recompute == "selective" and backward else 0.0
    return Work(
        kept=everywhere * kept + fixed,
        working=everywhere * value * (2 * n * d + (5 * query if recompute == "selective" else 0)),
        again=again,
        moved=(moved[0], moved[1]),
        tensor=(forward, back),
    )


def _feed_forward(config: RunConfig, recompute: str, layer: int) -> Work:
    """Norm, router and ffn experts."""
    moe, d, tp, value = config.moe, config.model.hidden_size, config.parallel.tensor, value_bytes(config)
    everywhere, share, ep = rows(config), slice_share(config), config.parallel.expert
    n, k, width = moe.num_ffn_experts, moe.active(layer), moe.ffn_width(config.model.ffn_size) / tp
    soft, trains = moe.routing_of(layer) == "soft", not (moe.adapters or moe.freeze_ffn_experts)
    copies = k
    if soft:  # on one rank the copy is the router's input, if that has the type
        copies = ep if ep > 1 else int(value == 2)
    adapted = k * moe.adapters
    elements = share * d + trains * copies * d + k * (2 + trains) * width + adapted * d / tp + k * d
    kept = elements * value + share * 4 + 4 * d + _routing_kept(config, layer)
    half = tensor_bytes(config, d) / 2
    forward = (2 + adapted) * half
    way = (ep - 1) if soft else k * (ep - 1) / ep
    sent = 2 * way * everywhere * d * value
    moved = [
        everywhere * value / 2 * (share * d * (norm + add) + k * width * swiglu + 2 * k * d * add)
        for norm, add, swiglu in zip(NORM_BYTES, ADD_BYTES, SWIGLU_BYTES, strict=True)
    ]
    weights = 4 * n // ep * width * d * value if trains else 0.0  # of one ffn expert after another, and all together
    return Work(
        kept=everywhere * kept + (n * d * 4.0 if value == 2 else 0.0),
        working=everywhere * value * (2 * k * d + 5 * width * (ep if soft else k)) + weights,
        moved=(moved[0], moved[1]),
        tensor=(forward, forward),
        expert=(sent, sent),
    )


def _routing_kept(config: RunConfig, layer: int) -> float:
    """Bytes per position of probabilities, weights, choices and orders."""
    moe, half = config.moe, 2 if value_bytes(config) == 2 else 0
    routing, n, k = moe.routing_of(layer), moe.num_ffn_experts, moe.active(layer)
    if routing == "soft":
        return n * (4 + half)
    orders = 16 * k * (2 if config.parallel.expert > 1 else 1)
    likely = 4 * n * (moe.balance > 0)
    if routing == "topk":
        return likely + k * (8 + 4 + half) + orders
    drawn = 4 * n if routing == "sample" else 0
    return (4 * n if routing == "switch" else likely + drawn) + 8 + (half or 4) + orders
