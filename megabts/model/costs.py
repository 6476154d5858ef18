"""What each part of a dense decoder costs in training, for the pipeline's cuts."""

from megabts.config.model import ModelConfig
from megabts.model.flops import head_flops, layer_flops
from megabts.parallel.balance import Cost, Costs


def dense_costs(config: ModelConfig, seq_length: int, *, recompute: bool = False) -> Costs:
    """Operations per token of a decoder that trains whole: forward once, backward twice.

    `recompute`: layers run forward once more in backward (train.recompute full). The embedding is a lookup; its
    backward adds one row a token, D additions.
    """
    layer, head = layer_flops(config, seq_length), head_flops(config)
    return Costs(
        embedding=Cost(0.0, config.hidden_size),
        layers=(Cost(layer, (3 if recompute else 2) * layer),) * config.num_layers,
        head=Cost(head, 2 * head),
    )
