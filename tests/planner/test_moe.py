"""MoE models as planned, of every kind: against the run's own models, what real ranks keep and send, and by hand."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megabts.build import BUILDERS, make_backend
from megabts.config.run import RunConfig
from megabts.errors import UsageError
from megabts.moe.flops import moe_flops
from megabts.optimizer.adamw import MasterAdamW
from megabts.planner.gpus import Cluster
from megabts.planner.moe import moe_of_members, moe_parts
from megabts.planner.report import plan_json, plan_text
from megabts.planner.search import plan
from tests.planner.layouts import SMALL, Arguments, Figures, configured, figures_of_steps, mesh_of, predicted
from tests.ranks import run_ranks

MEMBERS = {f"moe.members.{name}": "x" for name in ("seed", "code", "math", "languages")}
BAM: Arguments = {"moe.attention_experts": True}
ADAPTERS: Arguments = {**BAM, "moe.adapters": True}
KINDS: dict[str, Arguments] = {
    "top-2": {},
    "switch": {"moe.routing": "switch"},
    "soft": {"moe.routing": "soft"},
    "sample": {"moe.routing": "sample", "moe.balance": 0},
    "sparse upcycling": {"moe.split": 2, "moe.blend": True, "moe.top_k": 3},
    "frozen ffn experts": {"moe.freeze_ffn_experts": True},
    "BAM": BAM,
    "BAM adapters": ADAPTERS,
    "BAM adapters, soft": {**ADAPTERS, "moe.routing": "soft"},
}
LAYOUTS: dict[str, Arguments] = {
    "replicas": {},
    "ep4": {"parallel.expert": 4},
    "tp2+sp ep2": {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert": 2},
    "pp4 ep2": {"parallel.pipeline": 4, "parallel.expert": 2},
}
LARGE: Arguments = {
    "method": "moe",
    "model.preset": "1b",
    "precision.dtype": "bfloat16",
    "train.global_batch": 1024,
    "train.micro_batch": 1,
    **MEMBERS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_gradients_optimizer(kind: str) -> None:
    """Of the run's own models on the meta device, at 64 ranks, on every stage; parameters exactly."""
    dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    for layout in LAYOUTS.values():
        config = configured({**LARGE, **KINDS[kind], **layout})
        pp = config.parallel.pipeline
        for rank in range(0, 64, 64 // pp):
            mesh = mesh_of(config, 64, rank)
            model = BUILDERS["moe"](config, mesh, make_backend(config, mesh, torch.bfloat16, "meta"))
            optimizer = MasterAdamW(model.own_parameters(), config.optimizer, mesh, device="meta")
            memory = predicted(config, mesh)
            assert memory.parameters == sum(2 * parameter.numel() for parameter in model.parameters())
            trained = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            assert memory.gradients == trained
            state = [optimizer.master, *optimizer.moments.values()]
            assert memory.optimizer == pytest.approx(sum(x.nbytes for x in state), rel=0.02)
    dist.destroy_process_group()


SMALL_MOE: Arguments = {**SMALL, "method": "moe", **MEMBERS}
SPLIT: dict[str, Arguments] = {
    "dp2": {},
    "tp2": {"parallel.tensor": 2},
    "tp2+sp": {"parallel.tensor": 2, "parallel.sequence": True},
    "pp2": {"parallel.pipeline": 2},
    "ep2": {"parallel.expert": 2},
}


LONG: Arguments = {
    "precision.dtype": "bfloat16",
    "data.seq_length": 640,
    "train.global_batch": 4,
    "train.micro_batch": 1,
}


def cases() -> list[tuple[str, Arguments]]:
    """Every kind on dp, every layout and recomputation of some, bfloat16."""
    chosen = {f"{kind}, dp2": {**SMALL_MOE, **KINDS[kind]} for kind in KINDS}
    split = [("top-2", "tp2"), ("soft", "tp2"), ("soft", "ep2"), ("BAM", "tp2+sp"), ("BAM", "ep2"), ("top-2", "ep2")]
    for kind, layout in [*split, *product(("BAM adapters",), ("tp2", "tp2+sp", "pp2", "ep2"))]:
        chosen[f"{kind}, {layout}"] = {**SMALL_MOE, **KINDS[kind], **SPLIT[layout]}
    again = [("soft", "tp2+sp", "selective"), ("BAM", "tp2", "selective")]
    again += [("soft", "tp2+sp", "full"), ("BAM adapters", "tp2", "full")]
    for kind, layout, recompute in again:
        settings = {**SMALL_MOE, **KINDS[kind], **SPLIT[layout], "train.recompute": recompute}
        chosen[f"{kind}, {layout}, {recompute}"] = settings
    for kind in ("top-2", "soft", "sample", "BAM", "BAM adapters"):
        chosen[f"{kind}, bfloat16"] = {**SMALL_MOE, **KINDS[kind], **LONG}
    return list(chosen.items())


@pytest.fixture(scope="module")
def steps() -> list[Figures]:
    return run_ranks(2, figures_of_steps, 2, cases())


@pytest.mark.parametrize("case", [name for name, _ in cases()])
def test_activations(steps: list[Figures], case: str) -> None:
    """The most that autograd keeps, within 2 %; over ep, where no two ranks get as many tokens, on average."""
    pairs = [step[case]["kept"] for step in steps]
    if "ep2" in case:
        pairs = [(sum(real for real, _ in pairs) / 2, pairs[0][1])]
    for real, planned in pairs:
        assert planned == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("case", [name for name, _ in cases() if "tp2" in name])
def test_tensor_parallel_bytes(steps: list[Figures], case: str) -> None:
    """But the loss's three numbers a position."""
    real, planned = steps[0][case]["rings"]
    assert planned == pytest.approx(real, rel=0.01)


def test_tokens_on_their_way(steps: list[Figures]) -> None:
    """All-to-alls between two ranks; soft routing sends weights besides hidden states."""
    figures = steps[0]["soft, ep2"]
    assert figures["sent and received"][1] == pytest.approx(figures["rings"][0], rel=0.02)


@pytest.fixture
def config() -> RunConfig:
    experts = {f"bts.experts.{name}": "x" for name in ("code", "math", "languages")}
    sizes = {"model.preset": "paper-2.7b", "precision.dtype": "bfloat16", "train.global_batch": 64}
    return configured({**sizes, "method": "bts", **experts})


def test_the_papers_estimates(config: RunConfig) -> None:
    """Published: 7.2B parameters, of which sampling runs through 2.9B (arXiv 2502.00075, table 1)."""
    d, f, layers = 3072, 8192, 20
    moe = {name: moe_of_members(config, name) for name in ("btx-soft", "btx-top2", "btx-sample")}
    parts = moe_parts(moe["btx-soft"])
    assert sum(x.parameters for x in (parts.embedding, *parts.layers, parts.head)) == 7_219_817_472
    active = {name: [x.moe.active(layer) for layer in range(layers)] for name, x in moe.items()}
    assert {name: sum(counts) for name, counts in active.items()} == {"btx-soft": 80, "btx-top2": 40, "btx-sample": 23}
    assert 2_689_723_392 + 3 * 3 * d * f == 2_916_215_808
    sides = [replace(moe["btx-top2"], parallel=replace(config.parallel, expert=ep)) for ep in (1, 4)]
    whole, part = (moe_parts(x).layers[3] for x in sides)
    assert whole.parameters - part.parameters == 3 * 3 * d * f
    assert (part.trainable, part.spread, whole.spread) == (part.parameters, 3 * d * f, 0)
    rows = config.train.micro_batch * config.data.seq_length
    assert part.expert == (2 * 2 * 3 / 4 * rows * d * 2,) * 2  # two copies out and home, of bf16, three of four away


@pytest.mark.parametrize("kind", ["top-2", "soft", "BAM", "BAM adapters"])
def test_plan(kind: str) -> None:
    """Any MoE run is planned as it is: its ranks' samples make the batch, its FLOPs are the trainer's."""
    config = configured({**LARGE, **KINDS[kind], "train.global_batch": 64})
    found = plan(config, Cluster.of("h200", 8), top=4)
    assert {layout.config.parallel.expert for layout, _ in found.best} > {1}
    for layout, _ in found.best:
        assert (
            layout.dp * layout.config.parallel.expert * layout.num_microbatches * layout.config.train.micro_batch == 64
        )
    text, figures = plan_text(config, found), plan_json(config, found)
    assert text.startswith("moe, 16 layers x 2048, ")
    assert "settings: --parallel.tensor" in text
    expected = moe_flops(config.model, config.moe, config.data.seq_length).total
    assert figures["flops_per_step"] == expected * 64 * config.data.seq_length


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "moe"}, "method moe needs a moe.members.NAME at least"),
        ({**LARGE, "moe.split": 3}, "does not divide into 3 chunks"),
        ({"method": "routing"}, "method routing has one layout, replicas; planned are dense, bts, moe"),
    ],
)
def test_what_is_not_planned(settings: Arguments, message: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(configured(settings), Cluster.of("h200", 8), top=1)
    assert message in str(error.value)


def test_members_of_other_runs_are_refused(config: RunConfig) -> None:
    with pytest.raises(UsageError, match=r"--as moe is unknown; use one of btx-soft, btx-top2, btx-sample, bam$"):
        moe_of_members(config, "moe")
    with pytest.raises(UsageError, match=r"of the members of a bts run; this run's method is dense, with 3"):
        moe_of_members(replace(config, method="dense"), "bam")
