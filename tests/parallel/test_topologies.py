"""Topology changes nothing but speed: every layout of ranks against one rank, through the trainer, on gloo ranks.

In float32 the loss, the gradient norm and every gradient of a step agree to 1e-5 of a tensor's largest element. Over
three optimizer steps float64 is compared: there Adam does not turn the rounding of gradients near zero into steps.
A run resumed on the same layout is bit-equal; one saved on any of six layouts goes on on any of them. The layers of
Transformer Engine do the same.
"""

from itertools import groupby
from pathlib import Path

import pytest

from tests.parallel.topologies import (
    MODELS,
    RESUMED,
    STEPS,
    TOPOLOGIES,
    Job,
    Result,
    command_line,
    differences,
    prepare,
    train_all,
)
from tests.ranks import run_ranks


def te_models(name: str) -> list[str]:
    """The models of a topology that run with the layers of Transformer Engine, too."""
    return [f"{model} te" for model in TOPOLOGIES[name].models if model not in ("dense tied", "bts reduce")]


CASES = [(name, model) for name, topology in TOPOLOGIES.items() for model in topology.models if name != "one"]
CASES += [(name, "bts dropout") for name in ("tp2+sp", "pp2 x ep2", "dp2")]
CASES += [(name, "dense documents") for name in ("tp2+sp", "interleaved", "dp4")]
CASES += [(name, "bts documents") for name in ("tp2 x ep2", "pp2", "tp2 x pp2 x dp2")]
CASES += [("tp2 x ep2", "bts forms"), ("pp2", "bts placed")]
CASES += [(name, "bts forms mixture") for name in ("tp2+sp", "pp2", "tp2 x pp2 x dp2")]
TE_CASES = [(name, model) for name in TOPOLOGIES for model in te_models(name)]
LAYOUTS = ("one", "tp2+sp", "pp2", "dp2", "ep2", "tp2 x pp2 x dp2")
PAIRS = [(source, target) for source in LAYOUTS for target in LAYOUTS]
PAIR_MODEL = "bts"
pytestmark = pytest.mark.timeout(1200)  # the first test makes all runs
FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, made by two sets of ranks per world size."""
    folder = tmp_path_factory.mktemp("topologies")
    prepare(folder)
    first, second = [], []
    for name, model in [("one", model) for model in MODELS] + CASES:
        first += [job(folder, name, model, "float32", steps=1), job(folder, name, model, "float64")]
        second.append(job(folder, name, model, "float64", source=name))
    second += [job(folder, name, model, "float64") for name, model in TE_CASES]
    second += [
        job(folder, target, PAIR_MODEL, "float64", source=source) for source, target in PAIRS if source != target
    ]
    for jobs in (first, second):
        for world, some in groupby(sorted(jobs, key=world_of), key=world_of):
            run_ranks(world, train_all, [each for _, each in some], timeout=900)
    return folder


def world_of(item: tuple[int, Job]) -> int:
    return item[0]


def job(
    folder: Path, name: str, model: str, dtype: str, steps: int = STEPS, source: str | None = None
) -> tuple[int, Job]:
    """(ranks, run)"""
    topology, to = TOPOLOGIES[name], run_dir(folder, name, model, dtype, source)
    args = [*command_line(folder, to, model, topology.parallel, dtype), f"--train.steps={steps}"]
    return topology.world, Job(args, to, run_dir(folder, source, model, dtype) if source else None)


def run_dir(folder: Path, name: str, model: str, dtype: str, source: str | None = None) -> Path:
    return folder / "runs" / ", ".join([name, model, dtype] + ([f"from {source}"] if source else []))


def ids(cases: list[tuple[str, str]]) -> list[str]:
    return [f"{first}-{second}" for first, second in cases]


@pytest.mark.parametrize(("name", "model"), CASES, ids=ids(CASES))
def test_loss_and_every_gradient_equal_one_rank(folder: Path, name: str, model: str) -> None:
    found, expected = (Result(run_dir(folder, layout, model, "float32")) for layout in (name, "one"))
    for figure in ("loss", "grad_norm"):
        assert ((found.logged(figure) - expected.logged(figure)) / expected.logged(figure)).abs().max() < 1e-5
    worst = differences(found.gradients(), expected.gradients())
    assert {tensor: value for tensor, value in worst.items() if not value < 1e-5} == {}


@pytest.mark.parametrize(("name", "model"), CASES, ids=ids(CASES))
def test_three_optimizer_steps_equal_one_rank(folder: Path, name: str, model: str) -> None:
    found, expected = (Result(run_dir(folder, layout, model, "float64")) for layout in (name, "one"))
    assert_close(found, expected)
    assert len(expected.validated()) == (STEPS if "documents" in model else 0)
    assert ((found.validated() - expected.validated()).abs() < 1e-9).all()


@pytest.mark.parametrize(("name", "model"), CASES, ids=ids(CASES))
def test_a_resumed_run_is_bit_equal(folder: Path, name: str, model: str) -> None:
    found = Result(run_dir(folder, name, model, "float64", source=name))
    expected = Result(run_dir(folder, name, model, "float64"))
    assert found.logged("loss").equal(expected.logged("loss")[RESUMED:])
    for file in FILES:
        assert set(differences(found.tensors(STEPS, file), expected.tensors(STEPS, file)).values()) == {0.0}


@pytest.mark.parametrize(("name", "model"), TE_CASES, ids=ids(TE_CASES))
def test_layers_of_transformer_engine_equal_torch_on_one_rank(folder: Path, name: str, model: str) -> None:
    """With the stand-in: names, splits, and collectives that are the library's own."""
    found = Result(run_dir(folder, name, model, "float64"))
    assert_close(found, Result(run_dir(folder, "one", model.removesuffix(" te"), "float64")))


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=ids(PAIRS))
def test_a_run_saved_on_one_layout_goes_on_on_another(folder: Path, source: str, target: str) -> None:
    found = Result(run_dir(folder, target, PAIR_MODEL, "float64", source=source))
    assert_close(found, Result(run_dir(folder, "one", PAIR_MODEL, "float64")))


def assert_close(found: Result, expected: Result) -> None:
    """The same losses and the same state after the last step."""
    losses = found.logged("loss")
    assert len(losses) in (STEPS, STEPS - RESUMED)
    assert (losses / expected.logged("loss")[-len(losses) :] - 1).abs().max() < 1e-10
    for file in FILES:
        worst = differences(found.tensors(STEPS, file), expected.tensors(STEPS, file))
        assert {tensor: value for tensor, value in worst.items() if not value < 1e-8} == {}
