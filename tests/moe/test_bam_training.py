"""BAM and its adapters through the trainer: layouts of ranks against one rank, what trains, resuming, generation.

The members have one key-value head, which tp ranks share, norms and biases in their attentions, and tied embeddings:
trained in BAM, frozen with adapters. Each feed-forward is cut in two: six ffn experts beside three attention experts.
"""

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from megabts import assemble
from megabts.build import load_model
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.storage import step_name
from megabts.config.methods import MoEConfig
from megabts.config.run import RunConfig
from megabts.inference.generate import generate, generate_uncached
from megabts.inference.settings import GenerationSettings
from megabts.moe.flops import moe_flops
from megabts.moe.upcycle import NEW
from megabts.parallel.mesh import ParallelMesh
from megabts.train.trainer import Trainer
from tests.bts.folders import write_members
from tests.moe.test_training import command as moe_command
from tests.parallel.topologies import RESUMED, STEPS, Job, Result, differences, train_all
from tests.ranks import run_ranks
from tests.train.runs import build, last_hashes, make_ids, train

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 1,
    "ffn_size": 48,
    "qk_norm": True,
    "qkv_bias": True,
    "tie_embeddings": True,
    "init_std": 0.1,
}
PLAIN: dict[str, dict[str, Any]] = {
    "bam": {},
    "bam topk": {"moe.routing": "topk", "train.recompute": "full"},
    "adapters": {},
    "adapters topk": {"moe.routing": "topk", "train.recompute": "selective"},
}
TE = {"bam te": "bam", "adapters te": "adapters"}
"""With Transformer Engine's stand-in for the layers, compared with plain ones on one rank."""
MODELS = PLAIN | {name: {"precision.layers": "te"} for name in TE}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel.tensor": 2},
    "tp2+sp": {"parallel.tensor": 2, "parallel.sequence": True},
    "pp2": {"parallel.pipeline": 2},
    "dp2": {},
    "ep2": {"parallel.expert": 2},
}
CASES = [(layout, model) for layout in LAYOUTS for model in ("bam", "adapters")]
CASES += [("tp2+sp", "bam topk"), ("tp2", "adapters topk"), ("pp2", "adapters topk"), ("ep2", "adapters topk")]
CASES += [("tp2+sp", name) for name in TE]


def command(folder: Path, run_dir: Path, model: str, layout: dict[str, Any]) -> list[str]:
    start = {"checkpoint.init_from": folder / model.split()[0]}
    return moe_command(folder, run_dir, "topk", start | MODELS[model] | layout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upcycled models, and the runs of all layouts."""
    folder = tmp_path_factory.mktemp("bam")
    make_ids(folder / "ids")
    members = write_members(folder, "seed", "code", "math", **SIZES)
    for name, adapters in (("bam", False), ("adapters", True)):
        moe = MoEConfig(members, routing="soft", split=2, attention_experts=True, adapters=adapters)
        assemble.upcycle(RunConfig(moe=moe), folder / name)
    for model in PLAIN:
        assert train(command(folder, folder / "one" / model, model, {})) == 0
    jobs = [
        Job(command(folder, folder / layout / model, model, LAYOUTS[layout]), folder / layout / model)
        for layout, model in CASES
    ]
    run_ranks(2, train_all, jobs)
    return folder


@pytest.mark.parametrize("layout, model", CASES)
def test_layouts_equal_one_rank(folder: Path, layout: str, model: str) -> None:
    one, other = Result(folder / "one" / TE.get(model, model)), Result(folder / layout / model)
    assert torch.allclose(other.logged("loss"), one.logged("loss"), rtol=1e-9)
    assert torch.allclose(other.logged("grad_norm"), one.logged("grad_norm"), rtol=1e-9)
    assert max(differences(other.gradients(), one.gradients()).values()) < 1e-5
    tensors = (result.tensors(STEPS, MODEL_FILE) for result in (other, one))
    assert max(differences(*tensors).values()) < 1e-6


def test_losses_fall_and_what_is_frozen_stays(folder: Path) -> None:
    for model in PLAIN:
        run = Result(folder / "one" / model)
        first, last = (run.tensors(step, MODEL_FILE) for step in (1, STEPS))
        moved = {name for name, tensor in first.items() if not torch.equal(tensor, last[name])}
        assert moved == {name for name in first if model.startswith("bam") or name.endswith(NEW)}
        assert run.logged("loss")[-1] < run.logged("loss")[0]


@pytest.mark.parametrize("model", ["bam", "adapters topk"])
def test_a_resumed_run_is_bit_equal(folder: Path, tmp_path: Path, model: str) -> None:
    whole, again = folder / "one" / model, tmp_path / "again"
    copytree(whole / step_name(RESUMED), again / step_name(RESUMED))
    assert train(command(folder, again, model, {})) == 0
    assert last_hashes(again) == last_hashes(whole)


def test_the_trainer_counts_flops(folder: Path, tmp_path: Path) -> None:
    for model in ("bam", "adapters"):
        run = build(command(folder, tmp_path / model, model, {}))
        assert run.config.moe.attention_experts
        assert Trainer(run).flops_per_token == moe_flops(run.config.model, run.config.moe, 16).total


def test_generation_of_trained_models(folder: Path) -> None:
    settings = GenerationSettings(max_new_tokens=6, temperature=0.8)
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6], [9]]
    for model in PLAIN:
        loaded = load_model(folder / "one" / model, ParallelMesh(), None, "cpu").model
        assert generate(loaded, prompts, settings) == generate_uncached(loaded, prompts, settings)
