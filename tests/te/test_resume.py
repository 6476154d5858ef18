"""A run with delayed FP8 scaling, saved and resumed through the trainer: on the same layout, and on another one."""

from pathlib import Path

import pytest
import torch

from megabts.train.state import FP8_FILE
from tests.parallel.topologies import RESUMED, STEPS, Job, Result, command_line, prepare, train_all
from tests.ranks import run_ranks

TP, PP = {"tensor": 2}, {"pipeline": 2}
SETTINGS = ["--precision.fp8=delayed", "--model.ffn_size=64", "--model.hidden_size=64", "--train.micro_batch=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    prepare(folder)

    def job(name: str, parallel: dict[str, int], source: str = "") -> Job:
        args = command_line(folder, folder / name, "dense te", parallel, "float32") + SETTINGS
        return Job(args, folder / name, folder / source if source else None)

    jobs = [job("tp", TP), job("tp again", TP, "tp"), job("pp", PP, "tp")]
    run_ranks(2, train_all, jobs, timeout=240)
    return folder


def test_on_the_same_layout_it_is_bit_equal(folder: Path) -> None:
    unbroken, resumed = Result(folder / "tp"), Result(folder / "tp again")
    assert resumed.logged("loss").equal(unbroken.logged("loss")[RESUMED:])
    for file in ("model.safetensors", "optimizer.safetensors", FP8_FILE):
        found, expected = resumed.tensors(STEPS, file), unbroken.tensors(STEPS, file)
        assert found.keys() == expected.keys()
        assert all(tensor.equal(expected[name]) for name, tensor in found.items())


def test_on_another_layout_scales_go_on(folder: Path) -> None:
    """Pipeline stages have a part of the modules each; products are rounded alike but for the order of their sums."""
    unbroken, resumed = Result(folder / "tp"), Result(folder / "pp")
    torch.testing.assert_close(resumed.logged("loss"), unbroken.logged("loss")[RESUMED:], rtol=0.01, atol=0)
    before, found = (result.tensors(step, FP8_FILE) for result, step in ((unbroken, RESUMED), (resumed, STEPS)))
    assert found.keys() == before.keys()
    assert any("amax_history" in name for name in found)
    for name, history in found.items():
        if name.endswith("forward.amax_history"):  # a pass moves the history on by a row; what was there is still there
            seen = set(before[name].flatten().tolist()) - {0.0}
            assert seen
            assert seen <= set(history.flatten().tolist()), name
