"""The BTX estimate against the published counts (BTS, arXiv 2502.00075, table 1) and formulas by hand."""

from dataclasses import replace

import pytest

from megabts.config.run import RunConfig
from megabts.planner.decoder import decoder_parts
from megabts.planner.gpus import Cluster
from megabts.planner.methods import METHODS
from megabts.planner.moe import btx_parameters, btx_parts, sample, soft, top2
from megabts.planner.report import plan_text
from megabts.planner.search import plan
from tests.planner.layouts import configured

D, F, LAYERS, N = 3072, 8192, 20, 4


@pytest.fixture
def config() -> RunConfig:
    experts = {f"bts.experts.{name}": "x" for name in ("code", "math", "languages")}
    return configured(
        {
            "model.preset": "paper-2.7b",
            "method": "bts",
            "precision.dtype": "bfloat16",
            "train.global_batch": 64,
            **experts,
        }
    )


def with_experts(config: RunConfig, ep: int) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, expert=ep))


def test_total_parameters_are_the_published_ones(config: RunConfig) -> None:
    assert btx_parameters(config) == 7_219_817_472
    parts = btx_parts(soft, config)
    held = parts.embedding.parameters + parts.head.parameters + sum(layer.parameters for layer in parts.layers)
    assert held == 7_219_817_472


def test_expert_ranks_share_the_ffn_experts(config: RunConfig) -> None:
    whole, part = (btx_parts(soft, with_experts(config, ep)).layers[0].parameters for ep in (1, 4))
    assert whole - part == 3 * 3 * D * F


def test_active_parameters_give_the_flops(config: RunConfig) -> None:
    """6 per active matrix parameter and token; the published 2.9B of sampling has embeddings and norms, too."""
    dense = METHODS["dense"].flops(config)
    more = {name: METHODS[name].flops(config) - dense for name in ("btx-soft", "btx-top2", "btx-sample")}
    router = N * D * LAYERS
    assert more["btx-soft"] == 6 * (3 * LAYERS * 3 * D * F + router)
    assert more["btx-top2"] == 6 * (LAYERS * 3 * D * F + router)
    assert more["btx-sample"] == 6 * (3 * 3 * D * F + router)
    assert 2_689_723_392 + 3 * 3 * D * F == 2_916_215_808
    assert [sum(choose(layer, N) for layer in range(LAYERS)) for choose in (soft, top2, sample)] == [80, 40, 23]


def test_a_tokens_copies_cross_the_expert_axis(config: RunConfig) -> None:
    layer, dense = btx_parts(top2, with_experts(config, 4)).layers[3], decoder_parts(config).layers[3]
    rows = config.train.micro_batch * config.data.seq_length
    assert layer.expert == (2 * 2 * 3 / 4 * rows * D * 2,) * 2
    assert layer.kept - dense.kept == rows * 2 * (3 * F + 4 * D)


def test_plan_says_that_it_is_an_estimate(config: RunConfig) -> None:
    found = plan(config, Cluster.of("h200", 8), top=3, method="btx-top2")
    text = plan_text(config, found)
    assert "an estimate: BTX of the same members, with ffn experts over ep" in text
    assert "settings:" not in text
    for layout, _ in found.best:
        parallel = layout.config.parallel
        samples = layout.dp * parallel.expert * layout.num_microbatches * layout.config.train.micro_batch
        assert samples == 64
