"""Model FLOPs per token of a MoE model, counted as `model.flops` counts: what a token runs through, not what there is.

Also each part's cost, for the pipeline's cuts.
"""

from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.model.flops import Flops, head_flops, layer_flops
from megabts.parallel.balance import Cost, Costs


def moe_layer_flops(
    config: ModelConfig, moe: MoEConfig, seq_length: int, layer: int, *, causal: bool = True
) -> tuple[float, float]:
    """Forward operations per token of (a layer's ffn experts that a token runs through, all else in the layer)."""
    d = config.hidden_size
    experts = 6.0 * d * moe.ffn_width(config.ffn_size) * moe.active(layer)
    rest = layer_flops(config, seq_length, causal=causal) - 6.0 * d * config.ffn_size + 2.0 * d * moe.num_ffn_experts
    return experts, rest


def moe_flops(config: ModelConfig, moe: MoEConfig, seq_length: int, *, causal: bool = True) -> Flops:
    """Operations per training token: forward, and twice that backward; frozen ffn experts have no weight gradients."""
    total = Flops()
    for layer in range(config.num_layers):
        experts, rest = moe_layer_flops(config, moe, seq_length, layer, causal=causal)
        total += Flops(experts + rest, experts + rest, rest if moe.freeze_ffn_experts else experts + rest)
    head = head_flops(config)
    return total + Flops(head, head, head)


def moe_costs(config: ModelConfig, moe: MoEConfig, seq_length: int, *, recompute: bool = False) -> Costs:
    """Operations per token of each part; `recompute`: layers run forward once more in backward."""
    layers = []
    for layer in range(config.num_layers):
        experts, rest = moe_layer_flops(config, moe, seq_length, layer)
        backward = 2 * rest + (1 if moe.freeze_ffn_experts else 2) * experts
        layers.append(Cost(experts + rest, backward + (experts + rest if recompute else 0.0)))
    head = head_flops(config)
    return Costs(embedding=Cost(0.0, config.hidden_size), layers=tuple(layers), head=Cost(head, 2 * head))
