"""FLOPs of BTS models against computations by hand and the known BTS/dense ratios."""

from typing import Literal

import pytest

from megabts.bts.flops import bts_flops
from megabts.bts.plan import Kind, StitchPoint
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.model.flops import dense_flops

HIE: Kind = "hub_into_experts"
EIH: Kind = "experts_into_hub"
SMALL = ModelConfig(vocab_size=8192, hidden_size=256, num_layers=8, num_heads=8, num_kv_heads=4, ffn_size=704)
MEDIUM = ModelConfig(vocab_size=8192, hidden_size=512, num_layers=12, num_heads=8, num_kv_heads=4, ffn_size=1408)
TINY = ModelConfig(vocab_size=10, hidden_size=4, num_layers=4, num_heads=2, num_kv_heads=1, ffn_size=6)
LAYER = 2 * 4 * (4 + 2 * 2 + 4 + 3 * 6) + 4 * 3 * 4 // 2
HEAD = 2 * 4 * 10
LINEAR = 2 * 4 * 4


def every_two(layers: int) -> list[StitchPoint]:
    return [StitchPoint(at, EIH if (layers - at) % 4 == 0 else HIE) for at in range(2, layers + 1, 2)]


def bts(
    experts: int = 3,
    stream: Literal["projected", "unchanged"] = "projected",
    trainable: tuple[str, ...] = ("*",),
) -> BTSConfig:
    return BTSConfig(
        hub="h", experts={f"e{i}": f"d{i}" for i in range(experts)}, expert_stream=stream, trainable=list(trainable)
    )


@pytest.mark.parametrize(("config", "ratio"), [(SMALL, 2.07), (MEDIUM, 2.46)])
def test_known_ratio_of_bts_to_dense(config: ModelConfig, ratio: float) -> None:
    plan = every_two(config.num_layers)
    full = bts_flops(config, bts(), 256, plan, causal=False).total / dense_flops(config, 256, causal=False).total
    assert round(full, 2) == ratio
    half = bts_flops(config, bts(), 256, plan).total / dense_flops(config, 256).total
    assert half == pytest.approx(ratio, abs=0.015)


def test_alternating_by_hand() -> None:
    flops = bts_flops(
        TINY, bts(2), 3, [StitchPoint(1, HIE), StitchPoint(2, EIH), StitchPoint(3, HIE), StitchPoint(4, EIH)]
    )
    stitches = (2 * (2 + 2) + 2 * (2 + 3)) * LINEAR
    assert flops.forward == 3 * 4 * LAYER + HEAD + stitches
    assert flops.backward_activation == (2 * 3 + 2) * LAYER + HEAD + stitches
    assert flops.backward_weight == stitches


@pytest.mark.parametrize(("stream", "expert_layers"), [("projected", 2), ("unchanged", 0)])
def test_only_experts_into_hub(stream: Literal["projected", "unchanged"], expert_layers: int) -> None:
    flops = bts_flops(TINY, bts(2, stream), 3, [StitchPoint(2, EIH), StitchPoint(4, EIH)])
    stitches = 2 * (2 + 3) * LINEAR
    assert flops.forward == 3 * 4 * LAYER + HEAD + stitches
    assert flops.backward_activation == (2 * expert_layers + 2) * LAYER + HEAD + stitches


def test_one_stitch_at_the_end_passes_no_gradient_to_layers() -> None:
    flops = bts_flops(TINY, bts(2), 3, [StitchPoint(4, EIH)])
    assert flops.backward_activation == HEAD + 5 * LINEAR


def test_experts_stop_after_the_last_stitch() -> None:
    flops = bts_flops(TINY, bts(2), 3, [StitchPoint(3, EIH)])
    assert flops.forward == (3 * 3 + 1) * LAYER + HEAD + 5 * LINEAR
    assert flops.backward_activation == LAYER + HEAD + 5 * LINEAR


def test_training_one_added_expert_alone() -> None:
    flops = bts_flops(TINY, bts(2, trainable=("e1",)), 3, [StitchPoint(2, HIE), StitchPoint(4, EIH)])
    assert flops.backward_weight == 4 * LINEAR  # its projection and gate slice in both stitches
    assert flops.backward_activation == 2 * LAYER + HEAD + 4 * LINEAR


def test_nothing_trainable_has_no_backward() -> None:
    flops = bts_flops(TINY, bts(2, trainable=()), 3, [StitchPoint(2, HIE), StitchPoint(4, EIH)])
    assert (flops.backward_activation, flops.backward_weight) == (0, 0)
    assert flops.total == flops.forward
