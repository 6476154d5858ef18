"""Adam's health per layer, reported in the run's metrics and equal to a direct computation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megabts.config.run import OptimizerConfig, ParallelConfig
from megabts.model.part import Part
from megabts.optimizer.adamw import MasterAdamW
from megabts.optimizer.stability import AdamMonitor
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.runtime.metrics import read_metrics
from megabts.train.health import adam_health, layer_of
from tests.model.models import decoder
from tests.ranks import run_ranks
from tests.train.runs import arguments, build, train


def test_layers() -> None:
    assert layer_of("layers.3.mlp.down.weight") == "layers.3"
    assert layer_of("stitches.0.gates.code.weight") == "stitches.0"
    assert layer_of("head.weight") == "head"


def test_health_is_logged_every_so_many_steps(data: Path, blend: dict[str, float], tmp_path: Path) -> None:
    assert train(arguments(tmp_path / "run", blend, train__steps=10, logging__adam_every=5)) == 0
    rows, _ = read_metrics(tmp_path / "run")
    reported = [row["step"] for row in rows if "adam_cosine/layers.0" in row]
    assert reported == [5, 10]
    layers = {key.split("/")[1] for key in rows[9] if key.startswith("adam_update_norm/")}
    assert layers == {"embedding", "layers.0", "layers.1", "final_norm", "head"}
    assert all(-1 <= rows[9][f"adam_cosine/{layer}"] <= 1 for layer in layers)


def test_figures_against_a_direct_computation(data: Path, blend: dict[str, float]) -> None:
    run = build(arguments("", blend, train__steps=10))
    for buffer in (*run.optimizer.moments.values(), run.optimizer.gradients.flat):
        buffer.uniform_(0.1, 1)
    figures = adam_health(run.optimizer, AdamMonitor(), 100)
    state = {f"{kind}.{name}": values for kind, name, _, values in run.optimizer.shards()}
    views = {slot.name: slot.grad for slot in run.optimizer.gradients.slots}
    names = [name for name in run.optimizer.names if name.startswith("layers.1.")]
    ratio = torch.cat(
        [
            (state[f"exp_avg.{n}"] / (1 - 0.9**100)).flatten()
            / ((state[f"exp_avg_sq.{n}"] / (1 - 0.95**100)).sqrt().flatten() + 1e-8)
            for n in names
        ]
    )
    gradient = torch.cat([views[n].flatten() for n in names])
    assert figures["adam_update_norm/layers.1"] == pytest.approx(ratio.norm().item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(ratio, gradient, dim=0).item()
    assert figures["adam_cosine/layers.1"] == pytest.approx(cosine, rel=1e-4)


def filled_health(mesh: ParallelMesh) -> dict[str, float]:
    """Health of a tied decoder, or of this stage of one, whose state is random by name."""
    parts = (Part((range(1),), embedding=True, head=False), Part((range(1, 3),), embedding=False, head=True))
    part = parts[mesh.pp.rank] if mesh.pp.size > 1 else None
    sizes: dict[str, Any] = {"num_kv_heads": 1, "qk_norm": True, "tie_embeddings": True}
    model = decoder(mesh, sequence=mesh.tp.size > 1, part=part, **sizes)
    tied = ("embedding.weight",)
    optimizer = MasterAdamW(model.own_parameters(), OptimizerConfig(), mesh, bucket_elements=3000, tied=tied)
    metas = {name: meta for name, _, meta in model.own_parameters()}

    def values(kind: str, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(kind) * 1000 + len(name))
        return metas[name].shard(torch.rand(metas[name].shape, generator=generator) + 0.1, mesh.tp)

    for kind, name, (first, last), view in optimizer.shards():
        view.copy_(values(kind, name).flatten()[first:last])
    for slot in optimizer.gradients.slots:
        slot.grad.copy_(values("gradient", slot.name))
    return adam_health(optimizer, AdamMonitor(), 100)


def health_on_rank(rank: int) -> list[dict[str, float]]:
    layouts: tuple[dict[str, Any], ...] = ({}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}, {"pipeline": 2})
    return [filled_health(build_mesh(ParallelConfig(**layout), 4, rank)) for layout in layouts]


def test_ranks_report_all_layers_as_one_does() -> None:
    """On every rank; elements that several hold are counted once."""
    expected = filled_health(ParallelMesh())
    assert len(expected) == 3 * len(("embedding", "layers.0", "layers.1", "layers.2", "final_norm"))
    for found in run_ranks(4, health_on_rank):
        for figures in found:
            assert figures == pytest.approx(expected, rel=1e-5)
