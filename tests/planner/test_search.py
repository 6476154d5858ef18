"""The search: what it ranks fits, passes the run's checks, and is the fastest; times behave as times do."""

from dataclasses import astuple, replace
from itertools import pairwise

import pytest

from megabts.bts.flops import bts_flops
from megabts.bts.plan import stitch_plan
from megabts.build import model_costs
from megabts.config.run import RunConfig
from megabts.errors import UsageError
from megabts.model.flops import dense_flops
from megabts.parallel.layout import check_layout
from megabts.planner.gpus import GPUS, Cluster
from megabts.planner.methods import METHODS
from megabts.planner.report import plan_json, plan_text
from megabts.planner.search import Layout, every_layout, plan
from tests.planner.layouts import Arguments, configured

EXPERTS = {f"bts.experts.{name}": "x" for name in ("code", "math", "languages")}
DENSE: Arguments = {
    "model.preset": "1b",
    "precision.dtype": "bfloat16",
    "train.global_batch": 64,
    "data.seq_length": 4096,
}
STITCHED: Arguments = {**DENSE, "model.preset": "paper-2.7b", "method": "bts", **EXPERTS}
NODE = Cluster.of("h100", 8)


@pytest.fixture(scope="module", params=["dense", "bts"])
def config(request: pytest.FixtureRequest) -> RunConfig:
    return configured(DENSE if request.param == "dense" else STITCHED)


@pytest.fixture(scope="module")
def layouts(config: RunConfig) -> list[Layout]:
    """All that are looked at."""
    return list(every_layout(config, NODE, METHODS[config.method]))


def test_every_layout_passes_the_runs_checks(config: RunConfig, layouts: list[Layout]) -> None:
    assert len(layouts) > 50
    for layout in layouts:
        check_layout(layout.config, NODE.num_gpus)
        parallel = layout.config.parallel
        assert parallel.tensor * parallel.pipeline * parallel.expert * layout.dp == NODE.num_gpus
        assert layout.dp * layout.num_microbatches * layout.config.train.micro_batch == config.train.global_batch


def test_ranking_is_the_fastest_of_each_mesh_that_fits(config: RunConfig, layouts: list[Layout]) -> None:
    """Against timing everything."""
    best: dict[tuple[int, int, int], float] = {}
    for layout in layouts:
        if layout.memory.total <= NODE.gpu.memory:
            best[layout.mesh] = min(best.get(layout.mesh, 1e9), layout.timed().step().seconds)
    found = plan(config, NODE, top=4)
    assert [step.seconds for _, step in found.best] == sorted(best.values())[:4]
    assert [best[layout.mesh] for layout, _ in found.best] == sorted(best.values())[:4]
    assert found.num_fitting < found.num_layouts == len(layouts)


def test_more_recomputation_only_where_less_does_not_fit(layouts: list[Layout]) -> None:
    order = ("none", "selective", "full")
    fitting = [x for x in layouts if x.memory.total <= NODE.gpu.memory]
    kept = {}
    for layout in layouts:
        bare = replace(layout.config, train=replace(layout.config.train, recompute="none"))
        bare = replace(bare, parallel=replace(bare.parallel, cuts=[]))
        kept.setdefault(repr(bare), []).append(layout)
    for group in kept.values():
        assert [x.config.train.recompute for x in group] == list(order[: len(group)])
        assert all(x not in fitting for x in group[:-1])
        assert [x.memory.activations for x in group] == sorted((x.memory.activations for x in group), reverse=True)


def test_a_step_is_its_shares_and_no_shorter_than_its_work(layouts: list[Layout]) -> None:
    for layout in layouts[::7]:
        steps = layout.timed()
        step = steps.step()
        assert sum(astuple(step.shares)) == pytest.approx(step.seconds)
        assert steps.bound <= step.seconds * (1 + 1e-9)
        assert 0 <= step.bubble < 1


def test_few_rounds_of_a_schedule_stand_for_all() -> None:
    """Extrapolated to 64 micro-batches, against simulating them all."""
    config = configured({**STITCHED, "train.micro_batch": 1})
    pinned = frozenset({"train.micro_batch", "parallel.tensor", "parallel.expert"})
    layouts = [x for x in every_layout(config, NODE, METHODS["bts"], pinned) if x.config.parallel.pipeline > 1]
    assert {x.config.parallel.chunks for x in layouts} == {1, 2, 4}
    for layout in layouts:
        steps = layout.timed()
        assert steps.num_microbatches > 3 * layout.config.parallel.pipeline or layout.dp > 1
        forward, backward = ([stage.seconds(way) for stage in steps.stages] for way in (0, 1))
        whole = steps._simulated(steps.num_microbatches, forward, backward) + sum(steps.after)
        assert steps.step().seconds == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("what", ["nvlink", "network", "memory_bandwidth", "bf16"])
def test_twice_as_fast_hardware_is_never_slower(config: RunConfig, what: str) -> None:
    nodes = Cluster.of("h100", 16)
    faster = replace(nodes, gpu=replace(nodes.gpu, **{what: 2 * getattr(nodes.gpu, what)}))
    method, quicker = METHODS[config.method], 0
    pairs = zip(every_layout(config, nodes, method), every_layout(config, faster, method), strict=True)
    for before, after in list(pairs)[::5]:
        assert before.config == after.config
        slow, fast = before.timed().step().seconds, after.timed().step().seconds
        assert fast <= slow * (1 + 1e-9)
        quicker += fast < slow
    assert quicker


def test_more_data_parallel_ranks_take_less_time(config: RunConfig) -> None:
    pinned = frozenset({"parallel.tensor", "parallel.pipeline", "parallel.expert", "train.micro_batch"})
    single = replace(config, train=replace(config.train, micro_batch=1))
    seconds = [plan(single, Cluster.of("h200", gpus), top=1, pinned=pinned).best[0][1].seconds for gpus in (1, 2, 4, 8)]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(seconds))


def test_pinned_settings_stay(config: RunConfig) -> None:
    chosen = replace(config, parallel=replace(config.parallel, tensor=2), train=replace(config.train, micro_batch=2))
    found = plan(chosen, NODE, top=20, pinned=frozenset({"parallel.tensor", "train.micro_batch"}))
    assert {(x.config.parallel.tensor, x.config.train.micro_batch) for x, _ in found.best} == {(2, 2)}
    with pytest.raises(UsageError, match=r"parallel\.cuts is for the planner"):
        plan(chosen, NODE, top=1, pinned=frozenset({"parallel.cuts"}))


@pytest.mark.parametrize("gpus", [8, 64])
def test_bts_has_experts_side_by_side_and_depth_slices(gpus: int) -> None:
    found = plan(configured(STITCHED), Cluster.of("h200", gpus), top=100)
    parallels = [layout.config.parallel for layout, _ in found.best]
    assert any(parallel.expert == 4 for parallel in parallels)
    assert any(parallel.expert == 1 and parallel.pipeline >= 4 for parallel in parallels)


def test_flops_are_the_models(config: RunConfig) -> None:
    model, length = config.model, config.data.seq_length
    expected = dense_flops(model, length).total
    if config.method == "bts":
        plan_points = stitch_plan(model.num_layers, config.bts)
        expected = bts_flops(model, config.bts, length, plan_points).total
    found = plan(config, NODE, top=1)
    step = plan_json(config, found)
    assert step["flops_per_step"] == expected * 64 * length
    first = step["ranked"][0]
    assert first["mfu"] == pytest.approx(step["flops_per_step"] / first["seconds"] / (8 * 989e12))


def test_time_counts_the_models_flops() -> None:
    """A dense replica's matrix products: forward and backward of its costs at the usual share of the peak."""
    config = configured({**DENSE, "train.micro_batch": 1, "parallel.tensor": 1})
    pinned = frozenset({"train.micro_batch", "parallel.tensor"})
    (alone, step), *_ = plan(config, Cluster.of("h200", 1), top=1, pinned=pinned).best
    assert alone.config.train.recompute == "none"
    operations = dense_flops(config.model, 4096).total * 64 * 4096
    assert step.shares.compute == pytest.approx(operations / (0.75 * 989e12), rel=1e-5)
    assert sum(cost.total for cost in model_costs(config).layers) < operations


def test_nothing_fits_says_what_would() -> None:
    config = configured({**DENSE, "model.preset": "llama-3-8b", "train.micro_batch": 1})
    found = plan(config, Cluster.of("h100", 1), top=3)
    assert not found.best
    assert found.closest is not None
    text = plan_text(config, found)
    assert f"needs {found.closest.memory.total / 1e9:.1f} of 80 GB, most of it optimizer" in text
    assert "It would fit on 4 x H100." in text or "It would fit on 2 x H100." in text
    assert plan_json(config, found)["closest"]["memory"]["total"] > 80e9


def test_no_layout_at_all_is_said() -> None:
    """By the batch, where nothing was asked for; else by the flags without which there are some."""
    config = replace(configured(DENSE), train=replace(configured(DENSE).train, global_batch=3))
    odd = replace(config, model=replace(config.model, num_layers=1, num_heads=1, num_kv_heads=1))
    found = plan(odd, NODE, top=1)
    assert "No layout passes the run's checks on 8 GPUs: train.global_batch 3" in plan_text(odd, found)
    words = r"no layout on 8 GPUs passes the run's checks with --parallel.pipeline 1; it may be 8$"
    with pytest.raises(UsageError, match=words):
        plan(config, NODE, top=1, pinned=frozenset({"parallel.tensor", "parallel.pipeline", "optimizer.lr"}))
    pair = replace(config, parallel=replace(config.parallel, tensor=3, pipeline=5))
    with pytest.raises(UsageError, match=r"with --parallel.pipeline 5 --parallel.tensor 3; leave some out$"):
        plan(pair, NODE, top=1, pinned=frozenset({"parallel.tensor", "parallel.pipeline"}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Cluster.of("v100", 8), "--gpu v100 is unknown; use one of a100-80g, h100, h200, b200"),
        (lambda: Cluster.of("h100", 0), "--gpus is 0"),
        (lambda: Cluster.of("h100", 13), "--gpus 13 do not divide among 2 nodes of 8"),
        (lambda: plan(configured({"method": "bts"}), NODE, top=1), "needs a bts.experts.NAME"),
        (lambda: plan(configured({"precision.dtype": "float64"}), NODE, top=1), "float64 is not planned for"),
        (lambda: plan(configured({"precision.frozen": "bfloat16"}), NODE, top=1), "bfloat16 is not planned for"),
    ],
)
def test_bad_input_is_one_line(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(UsageError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_gpus_are_the_data_sheets() -> None:
    assert {name: round(gpu.memory / 1e9) for name, gpu in GPUS.items()} == {
        "a100-80g": 80,
        "h100": 80,
        "h200": 141,
        "b200": 180,
    }
    assert [gpu.bf16 for gpu in GPUS.values()] == [312e12, 989e12, 989e12, 2250e12]
    two = Cluster.of("h100", 16)
    assert (two.per_node, two.in_node(8), two.in_node(16)) == (8, True, False)
    assert two.bandwidth(8) == 9 * two.bandwidth(16)
