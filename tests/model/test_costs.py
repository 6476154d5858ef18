"""Costs of a dense decoder against its FLOPs."""

from megabts.config.model import ModelConfig
from megabts.model.costs import dense_costs
from megabts.model.flops import dense_flops, layer_flops
from megabts.parallel.balance import Cost, stages_with_backward

CONFIG = ModelConfig()


def test_parts_add_up_to_the_model() -> None:
    costs, flops = dense_costs(CONFIG, 32), dense_flops(CONFIG, 32)
    whole = sum(costs.layers, costs.head)
    assert whole == Cost(flops.forward, flops.backward_activation + flops.backward_weight)
    assert costs.embedding == Cost(0, CONFIG.hidden_size)


def test_recomputation_adds_a_forward_to_backward() -> None:
    plain, again = dense_costs(CONFIG, 32), dense_costs(CONFIG, 32, recompute=True)
    assert again.head == plain.head
    assert [b.backward - a.backward for a, b in zip(plain.layers, again.layers)] == [layer_flops(CONFIG, 32)] * 4


def test_a_stage_of_the_embedding_alone_has_a_backward() -> None:
    assert stages_with_backward(dense_costs(CONFIG, 32).of_stages([0])) == (True, True)
