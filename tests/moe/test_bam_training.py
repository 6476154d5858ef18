"""BAM and its adapters through the trainer: layouts of ranks against one rank, what trains, resuming, generation.

The members have one key-value head, which tp ranks share, norms and biases in their attentions, and tied embeddings:
trained in BAM, frozen with adapters. Each feed-forward is cut in two: six ffn experts beside three attention experts.
"""

import math
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts import assemble
from megabts.build import load_model
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.storage import step_name
from megabts.config.methods import MoEConfig
from megabts.config.run import RunConfig
from megabts.inference.generate import generate, generate_uncached, score
from megabts.inference.settings import GenerationSettings
from megabts.moe.flops import moe_flops
from megabts.moe.upcycle import NEW
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.metrics import read_metrics
from megabts.train.trainer import Trainer
from tests.bts.folders import write_members
from tests.moe.test_training import command as moe_command
from tests.parallel.topologies import RESUMED, STEPS, Job, Result, differences, train_all
from tests.ranks import run_ranks
from tests.tools import RunTool
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


@pytest.mark.parametrize("layout, model", CASES)
def test_every_layout_reports_the_routes_of_the_whole_batch(folder: Path, layout: str, model: str) -> None:
    one, other = (
        [{name: row[name] for name in row if name.startswith("moe/")} for row in read_metrics(run)[0]]
        for run in (folder / "one" / TE.get(model, model), folder / layout / model)
    )
    assert len(one) == STEPS
    assert [pytest.approx(row, rel=1e-9) for row in one] == other


@pytest.mark.parametrize("model", PLAIN)
def test_reported_attention_routes_by_hand(folder: Path, tmp_path: Path, model: str) -> None:
    """From every attention router's logits on the first batch, token by token; ffn experts' have their own names."""
    run = build(command(folder, tmp_path / "run", model, {}))
    logits: dict[int, list[Tensor]] = {0: [], 1: []}
    for layer, found in logits.items():
        router = run.model.layers[str(layer)].attention.router
        router.register_forward_hook(lambda _, __, out, found=found: found.append(out.detach().flatten(0, 1)))
    run.stages.losses(next(run.loader.iterate(0)), backward=False)
    row = read_metrics(folder / "one" / model)[0][0]
    entropies, dead = [], 0
    for layer, parts in logits.items():
        rows = torch.cat(parts).softmax(-1).tolist()
        best = [max(range(3), key=lambda index, p=p: p[index]) for p in rows]
        entropies.append(-sum(x * math.log(x) for p in rows for x in p) / len(rows))
        dead += 3 - len(set(best))
        name = f"moe/layer_{layer:02d}/attention_"
        for index in range(3):
            assert row[f"{name}share_{index}"] == best.count(index) / len(rows)
            assert row[f"{name}weight_{index}"] == pytest.approx(sum(p[index] for p in rows) / len(rows))
        assert row[f"{name}entropy"] == pytest.approx(entropies[-1])
        assert row[f"{name}dead"] == 3 - len(set(best))
    assert row["moe/attention_entropy"] == pytest.approx(sum(entropies) / 2)
    assert row["moe/attention_dead"] == dead
    assert row["moe/entropy"] != row["moe/attention_entropy"]
    assert len([key for key in row if "attention_share" in key]) == 6
    assert len([key for key in row if "/share_" in key]) == 12


def test_gates_of_attention_experts(folder: Path, run_tool: RunTool) -> None:
    checkpoint = folder / "one" / "bam"
    words = ["--checkpoint", checkpoint, "--tokenizer", "null:97", "--temperature", 0, "--max-new-tokens", 2]
    code, out, _ = run_tool("generate.py", *words, "--prompt", "5 17 3", "--gates")
    assert code == 0
    lines = [line for line in out.splitlines() if line]
    model = load_model(checkpoint, ParallelMesh(), None, "cpu").model
    logits: list[Tensor] = []
    model.layers["1"].attention.router.register_forward_hook(lambda _, __, out: logits.append(out.flatten(0, 1)))
    with torch.no_grad():
        score(model, [5, 17, 3, *map(int, lines[0].split())])
    p = logits[0].softmax(-1)
    start = next(number for number, line in enumerate(lines) if line.startswith("attention experts: mean weight"))
    assert lines[start + 1].split() == ["layer", "seed", "code", "math", "entropy"]
    cells = lines[start + 3].split()
    assert cells[0] == "1"
    assert [float(cell) for cell in cells[1:7:2]] == pytest.approx(p.mean(0).tolist(), abs=6e-4)
    shares = (p.argmax(-1).bincount(minlength=3) / len(p)).tolist()
    assert cells[2:7:2] == [f"{share:.1%}" for share in shares]


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
