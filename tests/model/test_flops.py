"""FLOPs of dense models against computations by hand."""

from megabts.config.model import PRESETS, ModelConfig
from megabts.model.flops import dense_flops, head_flops, layer_flops

TINY = ModelConfig(vocab_size=10, hidden_size=4, num_layers=4, num_heads=2, num_kv_heads=1, ffn_size=6)
LAYER = 2 * 4 * (4 + 2 * 2 + 4 + 3 * 6) + 4 * 3 * 4 // 2
HEAD = 2 * 4 * 10


def test_layer_by_hand() -> None:
    assert layer_flops(TINY, 3) == LAYER
    assert layer_flops(TINY, 3, causal=False) - layer_flops(TINY, 3) == 4 * 3 * 4 / 2
    assert head_flops(TINY) == HEAD


def test_dense_is_six_times_the_parameters_without_input_embedding() -> None:
    config = ModelConfig(preset="paper-2.7b", **PRESETS["paper-2.7b"])
    norms = (2 * config.num_layers + 1) * config.hidden_size
    parameters = config.num_parameters - config.vocab_size * config.hidden_size - norms
    flops = dense_flops(config, 8192)
    attention = 3 * config.num_layers * 4 * 8192 * config.hidden_size / 2
    assert flops.total == 6 * parameters + attention
    assert flops.forward == flops.backward_activation == flops.backward_weight


def test_tied_head_costs_as_much_as_an_untied_one() -> None:
    tied = ModelConfig(tie_embeddings=True)
    assert dense_flops(tied, 64) == dense_flops(ModelConfig(), 64)
