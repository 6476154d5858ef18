"""Adam's health per layer, reported in the run's metrics and equal to a direct computation."""

from pathlib import Path

import pytest
import torch

from megabts.optimizer.stability import AdamMonitor
from megabts.runtime.metrics import read_metrics
from megabts.train.health import adam_health, layer_of
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
