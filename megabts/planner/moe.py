"""Branch-Train-MiX (arXiv 2403.07816) of a BTS model's members, as an estimate: with ffn experts over ep.

Every layer's feed-forwards stand beside each other as ffn experts behind a linear router [N, D]; everything else is the
members' average, once. N members, of which a token runs through k: all of them (soft), the best two (top2), or one that
is sampled, where the first layer is soft (sample). All parameters train.

ffn experts are spread over ep, whose ranks have tokens of their own: a token's k copies go to their experts and back,
each way 2 k (P - 1) / P hidden states of a rank's positions. Tokens are taken to be spread evenly. Kept besides a dense
layer: the copies before and after their experts, and k feed-forwards in place of one. Gradients are counted as summed
over dp x ep and the optimizer as split over dp, which is a little more than what the averaged parts would take.
"""

from collections.abc import Callable
from dataclasses import replace

from megabts.config.run import RunConfig
from megabts.model.flops import dense_flops, head_flops, layer_flops
from megabts.parallel.balance import Cost, Costs
from megabts.planner.decoder import ADD_BYTES, SWIGLU_BYTES, decoder_parts
from megabts.planner.work import Parts, Work, rows, value_bytes

Active = Callable[[int, int], int]
"""(layer, members) -> ffn experts that a token runs through there."""


def soft(layer: int, members: int) -> int:
    """Every ffn expert, weighted."""
    return members


def top2(layer: int, members: int) -> int:
    """The two best."""
    return min(2, members)


def sample(layer: int, members: int) -> int:
    """One; in the first layer all (BTS, arXiv 2502.00075, counts 2.9B active parameters that way)."""
    return members if layer == 0 else 1


def btx_parts(active: Active, config: RunConfig, ep_rank: int = 0) -> Parts:
    """What a rank holds and does."""
    dense, members = decoder_parts(config), len(config.bts.members)
    extra = [_extra(config, active(layer, members)) for layer in range(config.model.num_layers)]
    return replace(dense, layers=tuple(layer + more for layer, more in zip(dense.layers, extra, strict=True)))


def btx_costs(active: Active, config: RunConfig) -> Costs:
    """Operations per token."""
    again = config.train.recompute == "full"
    layers = [_forward(active, config, layer) for layer in range(config.model.num_layers)]
    head = head_flops(config.model)
    return Costs(
        Cost(0.0, config.model.hidden_size),
        tuple(Cost(forward, (3 if again else 2) * forward) for forward in layers),
        Cost(head, 2 * head),
    )


def btx_flops(active: Active, config: RunConfig) -> float:
    """Model FLOPs per token: three times what it runs through."""
    more = sum(
        _forward(active, config, layer) - layer_flops(config.model, config.data.seq_length)
        for layer in range(config.model.num_layers)
    )
    return dense_flops(config.model, config.data.seq_length).total + 3 * more


def btx_parameters(config: RunConfig) -> int:
    """Of the whole model, routers included."""
    model, members = config.model, len(config.bts.members)
    ffn = 3 * model.hidden_size * model.ffn_size
    return model.num_parameters + model.num_layers * ((members - 1) * ffn + members * model.hidden_size)


def _forward(active: Active, config: RunConfig, layer: int) -> float:
    model, members = config.model, len(config.bts.members)
    ffn, router = 6 * model.hidden_size * model.ffn_size, 2 * members * model.hidden_size
    return layer_flops(model, config.data.seq_length) + (active(layer, members) - 1) * ffn + router


def _extra(config: RunConfig, active: int) -> Work:
    """What a layer has beyond a dense one's."""
    model, tp, ep, members = config.model, config.parallel.tensor, config.parallel.expert, len(config.bts.members)
    d, f, value, everywhere = model.hidden_size, model.ffn_size / tp, value_bytes(config), rows(config)
    parameters = (members // ep - 1) * 3 * d * model.ffn_size // tp + members * d
    wide = {"none": 3 * f, "selective": 3 * f, "full": 0.0}[config.train.recompute]
    copies = 0 if config.train.recompute == "full" else 2 * active * d
    moved = [
        everywhere * value / 2 * ((active - 1) * f * swiglu + 2 * active * d * add)
        for swiglu, add in zip(SWIGLU_BYTES, ADD_BYTES, strict=True)
    ]
    sent = 2 * active * (ep - 1) / ep * everywhere * d * value
    return Work(
        parameters=parameters,
        trainable=parameters,
        kept=everywhere * ((active - 1) * wide + copies) * value,
        working=everywhere * value * (2 * d + 5 * f) * active,
        moved=(moved[0], moved[1]),
        expert=(sent, sent),
    )
