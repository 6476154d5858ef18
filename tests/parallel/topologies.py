"""What the topology proof runs: the topologies, two models, and whole training runs on real ranks.

Every run goes through the trainer, so what is compared is what it logs (loss, gradient norm) and saves (weights,
moments). Gradients are read off the first moment after the first step, which is (1 - beta1) times the gradient.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megabts.checkpoint.reader import load_tensors
from megabts.checkpoint.storage import step_name
from megabts.config.load import load_config
from megabts.data.indexed import IndexedDatasetBuilder
from megabts.parallel.mesh import build_mesh
from megabts.runtime.metrics import read_metrics
from tests.bts.folders import write_members
from tests.te.standin import installed
from tests.train.runs import arguments, build, fit, make_ids

EXPERTS = ("code", "math", "languages")
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "qk_norm": True,
    "qkv_bias": True,
    "init_std": 0.1,
}
STEPS = 3
RESUMED = 2
"""Steps after which other runs go on."""
BETA1 = 0.9


@dataclass(frozen=True)
class Topology:
    """A layout of ranks, and what of the model is special to it."""

    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("dense", "bts")


TOPOLOGIES = {
    "one": Topology(1),
    "tp2": Topology(2, {"tensor": 2}),
    "tp2+sp": Topology(2, {"tensor": 2, "sequence": True}),
    "tp4 one kv head": Topology(4, {"tensor": 4}, ("dense one kv head", "bts one kv head")),
    "tp4+sp one kv head": Topology(
        4, {"tensor": 4, "sequence": True}, ("dense one kv head", "bts one kv head", "dense tied")
    ),
    "pp2": Topology(2, {"pipeline": 2}, ("dense", "bts", "dense tied")),
    "pp2 one after the other": Topology(2, {"pipeline": 2, "schedule": "none"}),
    "pp4": Topology(4, {"pipeline": 4}),
    "pp4 embedding and head alone": Topology(4, {"pipeline": 4, "cuts": [0, 1, 4]}, ("dense", "bts", "dense tied")),
    "interleaved": Topology(2, {"pipeline": 2, "schedule": "interleaved", "chunks": 2}, ("dense", "bts", "dense tied")),
    "dp2": Topology(2, {}),
    "dp4": Topology(4, {}),
    "ep2": Topology(2, {"expert": 2}, ("bts", "bts reduce")),
    "ep3": Topology(3, {"expert": 3}, ("bts", "bts reduce")),
    "ep4": Topology(4, {"expert": 4}, ("bts", "bts reduce")),
    "tp2 x pp2": Topology(4, {"tensor": 2, "pipeline": 2}, ("dense", "bts", "dense tied")),
    "tp2 x ep2": Topology(4, {"tensor": 2, "expert": 2}, ("bts", "bts reduce")),
    "pp2 x ep2": Topology(4, {"pipeline": 2, "expert": 2}, ("bts", "bts reduce")),
    "tp2 x pp2 x dp2": Topology(8, {"tensor": 2, "pipeline": 2}),
    "tp2+sp x pp2 x ep2": Topology(8, {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2}, ("bts reduce",)),
}
MODELS = (
    *("dense", "dense one kv head", "dense tied", "dense documents"),
    *("bts", "bts one kv head", "bts reduce", "bts dropout", "bts documents", "bts forms", "bts forms mixture"),
    "bts placed",
)


def prepare(folder: Path) -> None:
    """Data, some of it in short documents that end with token 96, and members of both kinds."""
    make_ids(folder / "ids")
    rng = np.random.RandomState(1)
    with IndexedDatasetBuilder(folder / "documents", np.uint16) as builder:
        for _ in range(60):
            builder.add_item([*rng.randint(96, size=rng.randint(2, 20)), 96])
            builder.end_document()
        builder.finalize()
    for name, sizes in (("members", SIZES), ("members one kv head", {**SIZES, "num_kv_heads": 1})):
        write_members(folder / name, "hub", *EXPERTS, **sizes)


def command_line(folder: Path, run_dir: Path, model: str, parallel: dict[str, Any], dtype: str) -> list[str]:
    """The arguments of one run."""
    settings: dict[str, Any] = {f"parallel.{name}": value for name, value in parallel.items()}
    sizes = {**SIZES, **({"num_kv_heads": 1} if "one kv head" in model else {})}
    if model.startswith("dense"):
        sizes |= {"tie_embeddings": True} if "tied" in model else {}
        settings |= {f"model.{name}": value for name, value in sizes.items()}
    else:
        members = folder / ("members one kv head" if "one kv head" in model else "members")
        settings |= {
            "method": "bts",
            "bts.hub": members / "hub",
            "bts.experts": json.dumps({name: str(members / name) for name in EXPERTS}),
            "bts.gate_dropout": 0.2 if "dropout" in model else 0.0,
            "parallel.exchange": "reduce" if "reduce" in model else "gather",
            "bts.num_stitch_layers": 4,
        }
    if "forms" in model:
        settings |= {"bts.gate": "token", "bts.gate_input": "normalised", "bts.projection_rank": 3}
    if "placed" in model:
        settings |= {"bts.num_stitch_layers": 3, "bts.placement": [1, 3, 4]}
    if "mixture" in model:
        settings |= {"bts.output": "mixture", "bts.gate_dropout": 0.2}
    settings |= {
        "data.tokenizer": "null:97",
        "data.seq_length": 16,
        "train.steps": STEPS,
        "train.global_batch": 4,
        "train.micro_batch": 1,
        "train.valid_every": -1,
        "optimizer.lr": 0.01,
        "optimizer.beta1": BETA1,
        "optimizer.clip_grad": 0.0,
        "parallel.bucket_mb": 1,
        "precision.dtype": dtype,
        "precision.layers": "te" if model.endswith("te") else "torch",
        "logging.tensorboard": False,
        "checkpoint.every": RESUMED,
        "checkpoint.keep": 0,
        "checkpoint.resume": True,
    }
    if "documents" in model:  # kept apart, their ends not predicted from; gradients are clipped, losses validated
        settings |= {
            "model.cross_document_attention": False,
            "data.eod_mask_loss": True,
            "data.valid": json.dumps({"short": str(folder / "documents")}),
            "train.valid_every": 1,
            "train.valid_samples": 5,
            "train.recompute": "selective",
            "optimizer.clip_grad": 0.1,
        }
    return arguments(run_dir, {str(folder / ("documents" if "documents" in model else "ids")): 1.0}, settings)


@dataclass(frozen=True)
class Job:
    """A run to make on some ranks: from nothing, or from the first step of another one."""

    args: list[str]
    run_dir: Path
    source: Path | None = None


def train_all(rank: int, jobs: list[Job]) -> None:
    """Several runs, one after the other, each whole."""
    world = torch.distributed.get_world_size()
    for job in jobs:
        if rank == 0 and job.source:
            job.run_dir.mkdir(parents=True)
            step = step_name(RESUMED)
            shutil.copytree(job.source / step, job.run_dir / step)
        torch.distributed.barrier()
        config = load_config(job.args)
        with transformer_engine() if config.precision.layers == "te" else nullcontext():
            assert fit(build(job.args, build_mesh(config.parallel, world, rank))) == 0


@contextmanager
def transformer_engine() -> Iterator[None]:
    """Inside the block the stand-in for Transformer Engine is there, and a CPU will do."""
    with installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("megabts.build.check_te", lambda _: None)
        yield


@dataclass(frozen=True)
class Result:
    """What a run logged and saved."""

    run_dir: Path

    def logged(self, name: str) -> torch.Tensor:
        """One figure of every step, e.g. `loss`."""
        return torch.tensor([row[name] for row in read_metrics(self.run_dir)[0]], dtype=torch.float64)

    def validated(self) -> torch.Tensor:
        """Validation losses of every step."""
        return torch.tensor([row["valid"]["short"] for row in read_metrics(self.run_dir)[1]], dtype=torch.float64)

    def tensors(self, step: int, file: str) -> dict[str, torch.Tensor]:
        """Whole tensors saved after `step` steps."""
        return load_tensors(self.run_dir / step_name(step), file)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Every gradient of the first step."""
        kind = "exp_avg."
        saved = self.tensors(1, "optimizer.safetensors")
        return {name[len(kind) :]: m / (1 - BETA1) for name, m in saved.items() if name.startswith(kind)}


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """max |found - expected| / max |expected| of every tensor."""
    assert found.keys() == expected.keys()
    return {
        name: ((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)).item()
        for name, tensor in expected.items()
    }
