"""Model FLOPs per token of a MoE model, counted as `model.flops` counts: what a token runs through, not what there is.

Also each part's cost, for the pipeline's cuts.
"""

from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.model.flops import Flops, head_flops, layer_flops
from megabts.parallel.balance import Cost, Costs


def moe_layer_flops(config: ModelConfig, moe: MoEConfig, seq_length: int, layer: int, *, causal: bool = True) -> Flops:
    """Operations per training token of one layer: of its ffn experts, those that a token runs through.

    What is frozen has no weight gradients. With adapters the members' weights are, and nothing before the first layer
    trains, so no gradient goes through its attention experts.
    """
    d, members, active = config.hidden_size, len(moe.members), moe.active(layer)
    experts = 6.0 * d * moe.ffn_width(config.ffn_size) * active
    attention = layer_flops(config, seq_length, causal=causal) - 6.0 * d * config.ffn_size
    ffn_new, attention_new = 2.0 * d * moe.num_ffn_experts, 0.0  # routers, adapters
    if moe.attention_experts:
        attention, attention_new = attention * members, 2.0 * d * members
    if not moe.adapters:
        forward = experts + ffn_new + attention + attention_new
        return Flops(forward, forward, forward - experts if moe.freeze_ffn_experts else forward)
    ffn_new += 2.0 * d * d * active
    attention_new += 2.0 * d * d * members
    after = experts + ffn_new
    forward = after + attention + attention_new
    return Flops(forward, forward if layer else after, ffn_new + attention_new)


def moe_flops(config: ModelConfig, moe: MoEConfig, seq_length: int, *, causal: bool = True) -> Flops:
    """Operations per training token."""
    total = Flops()
    for layer in range(config.num_layers):
        total += moe_layer_flops(config, moe, seq_length, layer, causal=causal)
    head = head_flops(config)
    return total + Flops(head, head, 0.0 if moe.adapters else head)


def moe_costs(config: ModelConfig, moe: MoEConfig, seq_length: int, *, recompute: bool = False) -> Costs:
    """Operations per token of each part; `recompute`: layers run forward once more in backward."""
    layers = []
    for layer in range(config.num_layers):
        work = moe_layer_flops(config, moe, seq_length, layer)
        backward = work.backward_activation + work.backward_weight
        layers.append(Cost(work.forward, backward + (work.forward if recompute else 0.0)))
    head = head_flops(config)
    embedding = Cost() if moe.adapters else Cost(0.0, config.hidden_size)
    return Costs(embedding, tuple(layers), Cost(head, head if moe.adapters else 2 * head))
