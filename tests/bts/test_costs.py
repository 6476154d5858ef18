"""Costs of a BTS model: against its FLOPs, by hand, and the documented predictions at the paper's sizes."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megabts.bts.costs import bts_costs
from megabts.bts.flops import bts_flops
from megabts.bts.flow import gradient_flow, needs_gradient
from megabts.bts.plan import stitch_plan
from megabts.config.methods import BTSConfig
from megabts.config.model import PRESETS, ModelConfig
from megabts.model.costs import dense_costs
from megabts.model.flops import head_flops, layer_flops
from megabts.parallel.balance import (
    Cost,
    Costs,
    equal_cuts,
    fastest_cuts,
    predict,
    stages_with_backward,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
CONFIG = ModelConfig(num_layers=8)
LAYER, LINEAR, HEAD = layer_flops(CONFIG, 32), 2 * CONFIG.hidden_size**2, head_flops(CONFIG)


def bts(trainable: list[str] | None = None, **settings: Any) -> BTSConfig:
    experts = {"code": "c", "math": "m", "prose": "p"}
    return BTSConfig(hub="h", experts=experts, trainable=trainable or ["*"], **settings)


PLACES: tuple[int | list[int], ...] = (1, 3, 4, 8, [5, 6, 7, 8], [1, 2, 8])


def placed(layers: int | list[int]) -> dict[str, Any]:
    """Settings of so many stitch layers, or of these."""
    if isinstance(layers, int):
        return {"num_stitch_layers": layers}
    return {"num_stitch_layers": len(layers), "placement": layers}


def test_parts_add_up_to_the_model() -> None:
    for k, alternating, stream, trainable in product(
        PLACES,
        (True, False),
        ("projected", "unchanged"),
        (["*"], ["code"], ["hub"], ["hub", "math"]),
    ):
        config = bts(trainable, **placed(k), alternating=alternating, expert_stream=stream)
        plan = stitch_plan(8, config)
        costs, flops = bts_costs(CONFIG, config, 32), bts_flops(CONFIG, config, 32, plan)
        assert costs.embedding == Cost()
        whole = sum(costs.layers, costs.head)
        assert whole == Cost(flops.forward, flops.backward_activation + flops.backward_weight)


def test_a_stage_has_a_backward_where_the_flow_says_so() -> None:
    for k, trainable in product(PLACES, (["*"], ["code"], ["hub"])):
        config = bts(trainable, **placed(k))
        flows = gradient_flow(stitch_plan(8, config), config)
        flags = stages_with_backward(bts_costs(CONFIG, config, 32).of_stages(range(1, 8)))
        assert list(flags) == [bool(needs_gradient(flows, depth)) for depth in range(1, 9)]


def test_by_hand() -> None:
    """Four layers, Hub-into-Experts after layer 2 and Experts-into-Hub after layer 4; three experts."""
    model = ModelConfig(num_layers=4)
    costs = bts_costs(model, bts(num_stitch_layers=2), 32)
    forward_only, passing = Cost(4 * LAYER, 0), Cost(4 * LAYER, 3 * LAYER)
    assert costs.layers == (
        forward_only,
        forward_only + Cost(6 * LINEAR, 12 * LINEAR),
        passing,
        passing + Cost(7 * LINEAR, 14 * LINEAR),
    )
    assert costs.head == Cost(HEAD, HEAD)
    again = bts_costs(model, bts(num_stitch_layers=2), 32, recompute=True)
    assert [b.backward - a.backward for a, b in zip(costs.layers, again.layers)] == [0, 0, 3 * LAYER, 3 * LAYER]


def test_late_places_by_hand() -> None:
    """Four layers, Hub-into-Experts after layer 3 and Experts-into-Hub after layer 4: three layers forward alone."""
    model = ModelConfig(num_layers=4)
    costs = bts_costs(model, bts(**placed([3, 4])), 32)
    forward_only, passing = Cost(4 * LAYER, 0), Cost(4 * LAYER, 3 * LAYER)
    assert costs.layers == (
        forward_only,
        forward_only,
        forward_only + Cost(6 * LINEAR, 12 * LINEAR),
        passing + Cost(7 * LINEAR, 14 * LINEAR),
    )


def test_expert_ranks() -> None:
    """A member a rank: one layer each; at the merging stitch a gathering hub has all gates, else each its own."""
    model = ModelConfig(num_layers=4)
    gathered = bts_costs(model, bts(num_stitch_layers=2), 32, num_expert_ranks=4, exchange="gather")
    assert gathered.layers[1:] == (
        Cost(LAYER + 2 * LINEAR, 4 * LINEAR),
        Cost(LAYER, LAYER),
        Cost(LAYER + 4 * LINEAR, max(LAYER + 2 * LINEAR, 8 * LINEAR)),
    )
    reduced = bts_costs(model, bts(num_stitch_layers=2), 32, num_expert_ranks=4, exchange="reduce")
    assert reduced.layers[3] == Cost(LAYER + 2 * LINEAR, LAYER + 4 * LINEAR)


PAPER = ModelConfig(preset="paper-2.7b", **PRESETS["paper-2.7b"])
MICROBATCHES, TOKENS, RATE, BANDWIDTH = 32, 4096, 0.45 * 989e12, 400e9


def paper_row(name: str, costs: Costs, num_members: int, num_ranks: int) -> str:
    """Equal against the fastest cuts: the cuts, seconds a step and bubble."""
    transfer = num_members * TOKENS * PAPER.hidden_size * 2 / BANDWIDTH
    cells, seconds = [], []
    for cuts in (equal_cuts(PAPER.num_layers, num_ranks), fastest_cuts(costs, num_ranks, MICROBATCHES)):
        found = predict(costs, cuts, num_ranks, MICROBATCHES, tokens=TOKENS, rate=RATE, transfer=transfer)
        cells.append(f"{', '.join(map(str, cuts))} | {found.seconds:.2f} s | {found.bubble:.0%}")
        seconds.append(found.seconds)
    return f"| {name} | {num_ranks} | {cells[0]} | {cells[1]} | {seconds[0] / seconds[1]:.2f} |"


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_documented_predictions_at_the_papers_sizes(num_ranks: int) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert paper_row("dense", dense_costs(PAPER, TOKENS), 1, num_ranks) in text
    assert paper_row("BTS", bts_costs(PAPER, bts(), TOKENS), 4, num_ranks) in text
