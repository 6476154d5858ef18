"""ffn experts on several ranks that have different samples, against one rank.

Whole runs in float64, through the trainer, as in test_training.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts import assemble
from megabts.checkpoint.storage import step_name
from megabts.config.load import load_config
from megabts.config.methods import MoEConfig
from megabts.config.run import RunConfig
from megabts.optimizer.stability import SpikeGuard
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.train.state import make_saver, restore, start_save
from tests.bts.folders import write_members
from tests.moe.test_training import SIZES, command
from tests.parallel.topologies import RESUMED, STEPS, Job, Result, differences, train_all
from tests.ranks import run_ranks
from tests.train.runs import build, make_ids, train

MODELS: dict[str, dict[str, Any]] = {
    "topk": {},
    "sample": {"moe.routing": "sample", "moe.balance": 0.1, "train.recompute": "selective"},
    "soft, frozen": {"moe.routing": "soft", "moe.freeze_ffn_experts": True, "train.recompute": "full"},
    "adapters": {},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert": 2}),
    "ep2 x dp2": (4, {"expert": 2}),
    "ep2 x tp2": (4, {"expert": 2, "tensor": 2, "sequence": True}),
    "ep2 x pp2": (4, {"expert": 2, "pipeline": 2}),
    "ep4": (4, {"expert": 4}),
}
CASES = [(layout, "topk") for layout in LAYOUTS]
CASES += [
    ("ep2 x tp2", "sample"),
    ("ep2 x pp2", "sample"),
    ("ep2 x dp2", "soft, frozen"),
    ("ep2 x pp2", "soft, frozen"),
]
WHOLE = ("model.safetensors", "optimizer.safetensors")


def arguments(folder: Path, run_dir: Path, model: str, layout: str = "one") -> list[str]:
    """A run that is also validated, on a number of windows that leaves ranks without one."""
    parallel = LAYOUTS[layout][1] if layout in LAYOUTS else {}
    settings = MODELS[model] | {f"parallel.{name}": value for name, value in parallel.items()}
    validation = {"data.valid": f"{{short: {folder / 'ids'}}}", "train.valid_every": 1, "train.valid_samples": 5}
    if model == "adapters":
        settings["checkpoint.init_from"] = folder / "adapters"
    return command(folder, run_dir, "topk", settings | validation)


def restored(run_dir: Path, args: list[str], source: Path, mesh: ParallelMesh) -> None:
    """Save what a run restored from the step folder `source`."""
    run, guard = build(args, mesh), SpikeGuard(sigma=0.0)
    saver = make_saver(run, run_dir)
    start_save(saver, run, restore(run, source, guard), guard)
    saved = saver.wait()
    assert saved is not None
    assert not saved.problem


def work(rank: int, jobs: list[Job], again: list[Job]) -> None:
    """Whole runs, then restored ones."""
    train_all(rank, jobs)
    for job in again:
        assert job.source is not None
        parallel = load_config(job.args).parallel
        restored(job.run_dir, job.args, job.source, build_mesh(parallel, torch.distributed.get_world_size(), rank))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of four members, and their runs on all layouts."""
    folder = tmp_path_factory.mktemp("moe")
    make_ids(folder / "ids")
    members = write_members(folder, "seed", "code", "math", "more", **SIZES)
    assemble.upcycle(RunConfig(moe=MoEConfig(members)), folder / "moe")
    adapters = MoEConfig(members, attention_experts=True, adapters=True)
    assemble.upcycle(RunConfig(moe=adapters), folder / "adapters")
    one = folder / "one" / "topk"
    for model in MODELS:
        assert train(arguments(folder, folder / "one" / model, model)) == 0
    for world in (2, 4):
        names = [name for name, (ranks, _) in LAYOUTS.items() if ranks == world]
        jobs = [
            Job(arguments(folder, folder / layout / model, model, layout), folder / layout / model)
            for layout, model in CASES
            if layout in names
        ]
        again = [
            Job(arguments(folder, folder / name / "restored", "topk", name), folder / name / "restored", one / step())
            for name in names
        ]
        run_ranks(world, work, jobs, again)
    return folder


def step() -> str:
    """The folder of the step that runs are restored from."""
    return step_name(RESUMED)


@pytest.mark.parametrize("layout, model", CASES)
def test_layouts_equal_one_rank(folder: Path, layout: str, model: str) -> None:
    one, other = Result(folder / "one" / model), Result(folder / layout / model)
    for name in ("loss", "grad_norm", "moe/entropy", "moe/layer_01/share_3", "moe/layer_01/balance_loss"):
        assert torch.allclose(other.logged(name), one.logged(name), rtol=1e-9, atol=0), name
    assert torch.allclose(other.validated(), one.validated(), rtol=1e-9, atol=0)
    assert max(differences(other.gradients(), one.gradients()).values()) < 1e-8
    assert max(differences(other.tensors(STEPS, WHOLE[0]), one.tensors(STEPS, WHOLE[0])).values()) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_ranks_checkpoint_is_restored_bit_by_bit_and_back(folder: Path, layout: str, tmp_path: Path) -> None:
    source = folder / layout / "topk"
    restored(tmp_path, arguments(folder, tmp_path, "topk"), source / step(), ParallelMesh())
    for file in WHOLE:
        one, there = (Result(folder / name).tensors(RESUMED, file) for name in ("one/topk", f"{layout}/restored"))
        assert_equal(there, one)
        assert_equal(Result(tmp_path).tensors(RESUMED, file), Result(source).tensors(RESUMED, file))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same bits under the same names."""
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]
