"""The planner's memory against what real ranks hold, within 2 %.

Parameters, gradients and optimizer state: the run's own builders on the meta device, over torch's fake process group,
at world sizes up to 1024. Activations: what autograd keeps through whole steps on gloo ranks. What these send is held
against the planned traffic.
"""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megabts.bts.model import BTSModel
from megabts.build import BUILDERS, make_backend
from megabts.model.decoder import sequence_loss
from megabts.model.fp8_linear import FP8Weight
from megabts.optimizer.adamw import MasterAdamW
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.parallel.sharding import initialise, named_metas
from megabts.runtime.device import DTYPES
from tests.planner.layouts import SMALL, Arguments, Figures, configured, figures_of_steps, predicted
from tests.ranks import run_ranks

BOUND = 0.02

EXPERTS = {f"bts.experts.{name}": "x" for name in ("code", "math", "languages")}
DENSE: Arguments = {"model.preset": "1b", "precision.dtype": "bfloat16", "train.global_batch": 1024}
STITCHED: Arguments = {**DENSE, "model.preset": "paper-2.7b", "method": "bts", "bts.hub": "x", **EXPERTS}
CUTS = [4, 7, 9, 11, 13, 15, 17]
ONE: Arguments = {"train.micro_batch": 1}
STATES: dict[str, tuple[int, Arguments]] = {
    "dense": (8, {**DENSE}),
    "dense, tensor": (8, {**DENSE, "parallel.tensor": 4, "parallel.sequence": True}),
    "dense, pipeline of tied ends": (64, {**DENSE, "parallel.tensor": 2, "parallel.pipeline": 4}),
    "dense, more ranks than key heads": (1024, {**DENSE, **ONE, "parallel.tensor": 16, "parallel.pipeline": 2}),
    "bts": (8, STITCHED),
    "bts, side by side": (64, {**STITCHED, "parallel.expert": 4, "parallel.exchange": "gather"}),
    "bts, side by side, sums": (64, {**STITCHED, "parallel.expert": 2, "parallel.exchange": "reduce"}),
    "bts, depth slices": (64, {**STITCHED, "parallel.pipeline": 8, "parallel.cuts": CUTS}),
    "bts, everything": (
        1024,
        {
            **STITCHED,
            **ONE,
            "parallel.tensor": 4,
            "parallel.expert": 4,
            "parallel.pipeline": 4,
            "parallel.schedule": "interleaved",
            "parallel.chunks": 2,
            "parallel.cuts": CUTS,
        },
    ),
}


@pytest.fixture(scope="module", params=STATES)
def world(request: pytest.FixtureRequest) -> Iterator[tuple[int, Arguments]]:
    size, arguments = STATES[request.param]
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    yield size, arguments
    dist.destroy_process_group()


def storage_bytes(*tensors: torch.Tensor) -> int:
    """Of unique storages."""
    return sum({id(s): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def test_parameters_gradients_optimizer(world: tuple[int, Arguments]) -> None:
    """On every place of the pipeline and expert axes, whose ranks differ."""
    size, arguments = world
    config = configured(arguments)
    parallel = config.parallel
    whole = size // (parallel.pipeline * parallel.expert * parallel.tensor)
    for pp_rank in range(parallel.pipeline):
        for ep_rank in range(parallel.expert):
            rank = (pp_rank * whole * parallel.expert + ep_rank) * parallel.tensor
            mesh = build_mesh(parallel, size, rank)
            assert (mesh.pp.rank, mesh.ep.rank, mesh.tp.rank) == (pp_rank, ep_rank, 0)
            model = BUILDERS[config.method](config, mesh, make_backend(config, mesh, torch.bfloat16, "meta"))
            optimizer = MasterAdamW(model.own_parameters(), config.optimizer, mesh, device="meta")
            memory = predicted(config, mesh)
            assert memory.parameters == storage_bytes(*model.parameters())
            flat, state = optimizer.gradients.flat, (optimizer.master, *optimizer.moments.values())
            assert memory.gradients == pytest.approx(storage_bytes(flat), rel=BOUND, abs=1)
            assert memory.optimizer == pytest.approx(storage_bytes(*state), rel=BOUND, abs=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_members_in_fp8(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes after a step, when the layers that pass gradient have their transposed copies."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # whose FP8 products are slow
    arguments = {**SMALL_BTS, "bts.placement": "[3, 4]", "bts.num_stitch_layers": 2, "precision.fp8": "current"}
    config = configured({**arguments, "precision.dtype": dtype})
    mesh, backend = ParallelMesh(), make_backend(config, ParallelMesh(), DTYPES[dtype], "cpu")
    model = BUILDERS["bts"](config, mesh, backend)
    assert isinstance(model, BTSModel)
    initialise(named_metas(model), 0, mesh)
    tokens = torch.zeros(2, 17, dtype=torch.int64)
    sequence_loss(model, tokens[:, 1:], tokens[:, 1:], torch.ones(2, 16)).backward()
    held, plain = [], []
    for parameter in model.parameters():
        if isinstance(parameter, FP8Weight):
            held += [x for x in (parameter.rounded.values, parameter.rounded.turned) if x is not None]
        else:
            plain.append(parameter)
    assert len(held) < 2 * len([x for x in model.parameters() if isinstance(x, FP8Weight)])
    assert predicted(config, mesh).parameters == storage_bytes(*held, *plain)


SMALL_BTS: Arguments = {**SMALL, "method": "bts", "bts.hub": "x", **EXPERTS}
LAYOUTS: dict[str, Arguments] = {
    "tp2": {"parallel.tensor": 2},
    "tp2+sp": {"parallel.tensor": 2, "parallel.sequence": True},
    "pp2": {"parallel.pipeline": 2},
    "interleaved": {"parallel.pipeline": 2, "parallel.schedule": "interleaved", "parallel.chunks": 2},
    "one after the other": {"parallel.pipeline": 2, "parallel.schedule": "none"},
    "ep2 gather": {"parallel.expert": 2, "parallel.exchange": "gather"},
    "ep2 reduce": {"parallel.expert": 2, "parallel.exchange": "reduce"},
    "dp2": {},
}
MODELS: dict[str, Arguments] = {
    "dense": SMALL,
    "dense, one sample": {**SMALL, **ONE, "train.global_batch": 4},
    "dense, one key head": {**SMALL, "model.num_kv_heads": 1, "model.qk_norm": True},
    "dense, post-norm": {
        **SMALL,
        "model.norm_position": "post",
        "model.qk_norm": True,
        "model.qk_norm_span": "full",
    },
    "dense, a key head each": {**SMALL, "model.num_kv_heads": 4},
    "bts": SMALL_BTS,
    "bts, own streams": {**SMALL_BTS, "bts.expert_stream": "unchanged", "bts.gate_dropout": 0},
    "bts, placed late": {**SMALL_BTS, "bts.num_stitch_layers": 2, "bts.placement": "[3, 4]"},
    "bts, two stitches": {**SMALL_BTS, "bts.num_stitch_layers": 2, "bts.start": "hub_preserving"},
}


GATHERED = "bts, into the hub only, ep2 gather"


def cases() -> list[tuple[str, Arguments]]:
    chosen = {}
    for layout, settings in LAYOUTS.items():
        for model, sizes in MODELS.items():
            seldom = layout in ("interleaved", "one after the other", "dp2") and model not in ("dense", "bts")
            if not seldom and ("bts" in model or "ep2" not in layout):
                chosen[f"{model}, {layout}"] = {**sizes, **settings}
    for recompute in ("selective", "full"):
        for model, layout in product(("dense", "bts"), ("tp2", "tp2+sp", "pp2", "ep2 reduce")):
            if "bts" in model or "ep2" not in layout:
                settings = {**MODELS[model], **LAYOUTS[layout], "train.recompute": recompute}
                chosen[f"{model}, {layout}, {recompute}"] = settings
    long = {"precision.dtype": "bfloat16", "data.seq_length": 640, "train.global_batch": 4, **ONE}
    chosen[GATHERED] = {**SMALL_BTS, **LAYOUTS["ep2 gather"], "bts.alternating": False}
    chosen["bts, pp2, bfloat16"] = {**SMALL_BTS, **LAYOUTS["pp2"], **long}
    return list(chosen.items())


@pytest.fixture(scope="module")
def steps() -> list[Figures]:
    return run_ranks(2, figures_of_steps, 2, cases())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", [name for name, _ in cases()])
def test_activations(steps: list[Figures], case: str, rank: int) -> None:
    real, planned = steps[rank][case]["kept"]
    assert planned == pytest.approx(real, rel=BOUND)


@pytest.mark.parametrize("case", [name for name, _ in cases() if "tp2" in name])
def test_tensor_parallel_bytes(steps: list[Figures], case: str) -> None:
    """But the loss's three numbers a position."""
    real, planned = steps[0][case]["rings"]
    assert planned == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("case", [name for name, _ in cases() if "pp2" in name or "interleaved" in name])
def test_message_bytes(steps: list[Figures], case: str) -> None:
    """Between stages, by the busiest rank."""
    assert max(step[case]["sent"][0] for step in steps) == steps[0][case]["sent"][1]


def test_gathered_bytes(steps: list[Figures]) -> None:
    """Projected states on their way to the hub and back."""
    real, planned = steps[0][GATHERED]["sent and received"]
    assert planned == real
