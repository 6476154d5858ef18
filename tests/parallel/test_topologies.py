"""Topology changes nothing but speed: every layout of ranks against one rank, through the trainer, on gloo ranks.

In float32 the loss, the gradient norm and every gradient of a step agree to 1e-5 of a tensor's largest element. Over
three optimizer steps float64 is compared: there Adam does not turn the rounding of gradients near zero into steps.
A run resumed on the same layout is bit-equal; one saved on any of six layouts goes on on any of them.
"""

from pathlib import Path

import pytest

from tests.parallel.topologies import (
    MODELS,
    STEPS,
    TOPOLOGIES,
    Result,
    command_line,
    differences,
    from_step,
    prepare,
    train_all,
)
from tests.ranks import run_ranks

CASES = [(name, model) for name, topology in TOPOLOGIES.items() for model in topology.models if name != "one"]
CASES += [("tp2+sp", "bts dropout"), ("pp2 x ep2", "bts dropout"), ("dp2", "bts dropout")]
PAIRS = ("one", "tp2+sp", "pp2", "dp2", "ep2", "tp2 x pp2 x dp2")
PAIR_MODEL = "bts one kv head"
WORLDS = sorted({topology.world for topology in TOPOLOGIES.values()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, made by one set of ranks per world size."""
    folder = tmp_path_factory.mktemp("topologies")
    prepare(folder)
    cases = [("one", model) for model in MODELS] + CASES
    for world in WORLDS:
        lines = []
        for name, model in cases:
            if TOPOLOGIES[name].world == world:
                lines += command_lines(folder, name, model)
        run_ranks(world, train_all, lines, timeout=600)
    return folder


def command_lines(folder: Path, name: str, model: str) -> list[list[str]]:
    """One step in float32, and three in float64."""
    parallel = TOPOLOGIES[name].parallel
    return [
        [*command_line(folder, run_dir(folder, name, model, dtype), model, parallel, dtype), f"--train.steps={steps}"]
        for dtype, steps in (("float32", 1), ("float64", STEPS))
    ]


def run_dir(folder: Path, name: str, model: str, dtype: str) -> Path:
    return folder / "runs" / f"{name}, {model}, {dtype}"


def result(folder: Path, name: str, model: str, dtype: str) -> Result:
    return Result(run_dir(folder, name, model, dtype))


@pytest.mark.parametrize(("name", "model"), CASES, ids=[f"{name}-{model}" for name, model in CASES])
def test_loss_and_every_gradient_equal_one_rank(folder: Path, name: str, model: str) -> None:
    found, expected = (result(folder, layout, model, "float32") for layout in (name, "one"))
    for figure in ("loss", "grad_norm"):
        assert ((found.logged(figure) - expected.logged(figure)) / expected.logged(figure)).abs().max() < 1e-5
    worst = differences(found.gradients(), expected.gradients())
    assert {tensor: value for tensor, value in worst.items() if not value < 1e-5} == {}


@pytest.mark.parametrize(("name", "model"), CASES, ids=[f"{name}-{model}" for name, model in CASES])
def test_three_optimizer_steps_equal_one_rank(folder: Path, name: str, model: str) -> None:
    found, expected = (result(folder, layout, model, "float64") for layout in (name, "one"))
    assert ((found.logged("loss") - expected.logged("loss")) / expected.logged("loss")).abs().max() < 1e-10
    for file in ("model.safetensors", "optimizer.safetensors"):
        worst = differences(found.tensors(STEPS, file), expected.tensors(STEPS, file))
        assert {tensor: value for tensor, value in worst.items() if not value < 1e-8} == {}
