"""A MoE model through the commands: layouts of ranks against one rank, resuming, generation, what is refused.

In float64, through the trainer: losses, gradient norms and every gradient of the first step, weights after three.
"""

from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megabts import assemble
from megabts.build import load_model
from megabts.checkpoint.storage import step_name
from megabts.config.load import load_config
from megabts.config.methods import MoEConfig
from megabts.config.run import RunConfig
from megabts.errors import UsageError
from megabts.inference.generate import generate, generate_uncached
from megabts.inference.settings import GenerationSettings
from megabts.moe.flops import moe_flops
from megabts.parallel.layout import check_layout
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.metrics import read_metrics
from megabts.train.trainer import Trainer
from tests.bts.folders import write_members
from tests.parallel.topologies import BETA1, RESUMED, STEPS, Job, Result, differences, train_all
from tests.ranks import run_ranks
from tests.train.runs import arguments, build, last_hashes, make_ids, train

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "init_std": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "topk": {},
    "sample": {"moe.routing": "sample", "moe.balance": 0.1},
    "soft, frozen": {"moe.routing": "soft", "moe.freeze_ffn_experts": True, "train.recompute": "full"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel.tensor": 2},
    "tp2+sp": {"parallel.tensor": 2, "parallel.sequence": True},
    "pp2": {"parallel.pipeline": 2},
    "dp2": {},
}
CASES = [(layout, "topk") for layout in LAYOUTS]
CASES += [("tp2+sp", "sample"), ("pp2", "sample"), ("tp2+sp", "soft, frozen"), ("pp2", "soft, frozen")]


def command(folder: Path, run_dir: Path, model: str, layout: dict[str, Any]) -> list[str]:
    settings = {
        "checkpoint.init_from": folder / "moe",
        "data.tokenizer": "null:97",
        "data.seq_length": 16,
        "train.steps": STEPS,
        "train.global_batch": 4,
        "train.micro_batch": 1,
        "train.valid_every": -1,
        "optimizer.lr": 0.01,
        "optimizer.beta1": BETA1,
        "optimizer.clip_grad": 0.0,
        "precision.dtype": "float64",
        "logging.tensorboard": False,
        "checkpoint.every": 1,
        "checkpoint.keep": 0,
        "checkpoint.resume": True,
    }
    return arguments(run_dir, {str(folder / "ids"): 1.0}, settings | MODELS[model] | layout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upcycled model, and the runs of all layouts."""
    folder = tmp_path_factory.mktemp("moe")
    make_ids(folder / "ids")
    members = write_members(folder, "seed", "code", "math", **SIZES)
    assemble.upcycle(RunConfig(moe=MoEConfig(members)), folder / "moe")
    for model in MODELS:
        assert train(command(folder, folder / "one" / model, model, {})) == 0
    jobs = [
        Job(command(folder, folder / layout / model, model, LAYOUTS[layout]), folder / layout / model)
        for layout, model in CASES
    ]
    again = folder / "tp2+sp from one" / "topk"
    jobs.append(Job(command(folder, again, "topk", LAYOUTS["tp2+sp"]), again, folder / "one" / "topk"))
    run_ranks(2, train_all, jobs)
    return folder


@pytest.mark.parametrize("layout, model", [*CASES, ("tp2+sp from one", "topk")])
def test_layouts_equal_one_rank(folder: Path, layout: str, model: str) -> None:
    one, other = Result(folder / "one" / model), Result(folder / layout / model)
    if "from" not in layout:
        assert torch.allclose(other.logged("loss"), one.logged("loss"), rtol=1e-9)
        assert torch.allclose(other.logged("grad_norm"), one.logged("grad_norm"), rtol=1e-9)
        assert max(differences(other.gradients(), one.gradients()).values()) < 1e-5
    file = "model.safetensors"
    assert max(differences(other.tensors(STEPS, file), one.tensors(STEPS, file)).values()) < 1e-6


@pytest.mark.parametrize("layout, model", CASES)
def test_every_layout_reports_the_routes_of_the_whole_batch(folder: Path, layout: str, model: str) -> None:
    one, other = (
        [{name: row[name] for name in row if name.startswith("moe/")} for row in read_metrics(run)[0]]
        for run in (folder / "one" / model, folder / layout / model)
    )
    assert len(one) == STEPS
    assert [pytest.approx(row, rel=1e-9) for row in one] == other


def test_reported_routes_by_hand(folder: Path, tmp_path: Path) -> None:
    run = build(command(folder, tmp_path / "run", "topk", {}))
    logits: list[Tensor] = []
    run.model.layers["1"].mlp.router.register_forward_hook(lambda _, __, out: logits.append(out.detach().flatten(0, 1)))
    run.stages.losses(next(run.loader.iterate(0)), backward=False)
    row = read_metrics(folder / "one" / "topk")[0][0]
    p = torch.cat(logits).softmax(-1).numpy()
    chosen = np.argsort(-p, 1)[:, :2]
    for index in range(3):
        assert row[f"moe/layer_01/share_{index}"] == (chosen == index).mean()
    assert row["moe/layer_01/dead"] == 3 - len(np.unique(chosen))
    assert row["moe/layer_01/entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean())
    losses = []
    for one in (part.softmax(-1).numpy() for part in logits):
        best = np.sort(one, 1)[:, 1:]
        kept = np.where(one >= best[:, :1], one, 0) / best.sum(1, keepdims=True)
        losses.append(0.01 * 3 * (kept.mean(0) * one.mean(0)).sum())
    assert row["moe/layer_01/balance_loss"] == pytest.approx(np.mean(losses))
    assert row["moe/dropped"] == 0
    assert row["moe/entropy"] == pytest.approx((row["moe/layer_00/entropy"] + row["moe/layer_01/entropy"]) / 2)


def test_frozen_ffn_experts_stay_and_all_else_moves(folder: Path) -> None:
    first, last = (Result(folder / "one" / "soft, frozen").tensors(step, "model.safetensors") for step in (1, STEPS))
    same = {name for name, tensor in first.items() if torch.equal(tensor, last[name])}
    assert same == {f"layers.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up", "down")}


@pytest.mark.parametrize("model", ["topk", "sample"])
def test_a_resumed_run_is_bit_equal(folder: Path, tmp_path: Path, model: str) -> None:

    whole, again = folder / "one" / model, tmp_path / "again"
    copytree(whole / step_name(RESUMED), again / step_name(RESUMED))
    assert train(command(folder, again, model, {})) == 0
    assert last_hashes(again) == last_hashes(whole)


def test_the_trainer_counts_active_flops(folder: Path, tmp_path: Path) -> None:
    run = build(command(folder, tmp_path / "run", "topk", {}))
    assert Trainer(run).flops_per_token == moe_flops(run.config.model, run.config.moe, 16).total


def test_generation_with_a_cache_equals_generation_without(folder: Path) -> None:
    for model in MODELS:
        loaded = load_model(folder / "one" / model, ParallelMesh(), None, "cpu")
        settings = GenerationSettings(max_new_tokens=6, temperature=0.8)
        prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6], [9]]
        assert generate(loaded.model, prompts, settings) == generate_uncached(loaded.model, prompts, settings)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    args = command(folder, tmp_path / "run", "topk", {})
    with pytest.raises(UsageError, match=r"moe.split is 2, but the weights in .* have 1; leave it out"):
        build([*args, "--moe.split=2"])
    with pytest.raises(UsageError, match="starts from an upcycled checkpoint"):
        build([*args, "--checkpoint.init_from=", "--method=moe"])
    members = "--moe.members={a: x, b: y}"
    with pytest.raises(UsageError, match=r"2 ffn experts do not divide among parallel.expert 3 ranks; .* may be 1, 2"):
        check_layout(load_config(["--method=moe", members, "--parallel.expert=3"]), 3)
    with pytest.raises(UsageError, match=r"width 6 do not divide among parallel.tensor 4"):
        check_layout(
            load_config(["--method=moe", members, "--moe.split=8", "--model.ffn_size=48", "--parallel.tensor=4"]), 4
        )
    with pytest.raises(UsageError, match=r"moe.top_k is 3, more than the 2 ffn experts"):
        load_config(["--method=moe", members, "--moe.top_k=3"])
