"""The training benchmarks' rows from hand-made seconds, their counts of operations, and rounds that really train."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megabts.benchmark import decode, shapes, training
from megabts.benchmark.contestants import Contestant
from megabts.benchmark.suite import Row, Settings
from megabts.benchmark.timing import Measure
from megabts.config.model import ModelConfig
from megabts.train.step import StepResult, train_step
from megabts.viz.scaling import draw_scaling

TINY = ModelConfig(vocab_size=61, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, ffn_size=48)


def test_rows_of_known_seconds() -> None:
    seconds = {"hf": [2.0, 4.0], "hf_plain": [1.0, 2.0], "dense": [1.0, 2.0], "bts": [4.0, 8.0], "matmul": [0.1, 0.1]}
    peaks = {"hf": 2 * 10**9, "dense": 10**9, "bts": 3 * 10**9}
    rows = {row.name: row for row in training._rows("S", "fp32", seconds, peaks)}
    assert rows["S.fp32.dense_vs_hf"].value == Measure(2.0, 0.0)
    assert rows["S.fp32.bts_vs_hf_dense"].value == Measure(0.5, 0.0)
    assert rows["S.fp32.dense_vs_hf_plain"].line is None
    assert rows["S.fp32.dense_peak_vs_hf"].value.median == 0.5
    assert rows["S.fp32.bts_peak_gb"].value.median == 3.0
    predicted = rows["S.fp32.bts_vs_predicted"].value.median
    assert predicted == pytest.approx(4 / 2.06, rel=0.01)  # four times the dense step, 2.06 times its operations
    mixed = {**seconds, "bts_bf16_members": [2.0, 4.0]}, {**peaks, "bts_bf16_members": 10**9}
    rows |= {row.name: row for row in training._rows("S", "fp32", *mixed)}
    assert rows["S.fp32.bts_bf16_members_vs_hf_dense"].value == Measure(1.0, 0.0)
    assert rows["S.fp32.bts_bf16_members_peak_gb"].value.median == 1.0
    assert rows["S.fp32.bts_vs_hf_dense"].value == Measure(0.5, 0.0)
    assert rows["S.fp32.bts_vs_predicted"].value.median == predicted
    ours = rows["S.fp32.dense_vs_hf"].ours
    assert ours is not None
    assert ours.median == pytest.approx((2048 / 1 + 2048 / 2) / 2)


class Ready(Contestant):
    """A contestant without a process, that takes a second a round."""

    def __init__(self, make: object, name: str) -> None:
        self.name = name

    def run(self) -> float:
        return 1.0

    def peak_bytes(self) -> int:
        return 10**9

    def profile(self, settings: Settings, row: str) -> None:
        settings.progress(f"{row} of {self.name}")

    def close(self) -> None:
        pass


def test_profiles_are_named_after_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Contestant", Ready)
    monkeypatch.setattr(decode, "Contestant", Ready)
    said: list[str] = []
    settings = Settings(progress=said.append)
    rows = training._training("S", "fp32", settings)
    assert said[-4:] == [f"S.fp32.{name} of {name} S fp32" for name in ("hf", "dense", "bts", "bts_bf16_members")]
    for batch, place in ((1, "S.bf16.decode"), (16, "S.bf16.decode_16")):
        rows += decode.decode(settings, "S", "bf16", batch)
        assert said[-3:] == [f"{place}_{name} of decode {name} S bf16" for name in ("dense", "bts", "hf")]
    for prefix in ("S.fp32.dense", "S.fp32.bts", "S.bf16.decode_dense", "S.bf16.decode_16_bts"):
        assert any(row.name.startswith(f"{prefix}_vs_") for row in rows), prefix


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "S", TINY)
    monkeypatch.setattr(training, "BATCH", 2)
    monkeypatch.setattr(training, "LENGTH", 16)
    monkeypatch.setattr(training, "MICRO_BATCHES", {("bts", "S", "fp32"): 1})


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("kind", "batches"), [("dense", 1), ("bts", 2)])
def test_a_round_is_a_training_step(kind: str, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []

    def spied(*args: Any) -> StepResult:
        assert len(args[3]) == batches
        results.append(train_step(*args))
        return results[-1]

    monkeypatch.setattr(training, "train_step", spied)
    run = training.make_round(kind, "S", "fp32")
    for _ in range(20):
        run()
    assert {result.tokens for result in results} == {32}
    assert not any(result.skipped for result in results)
    assert results[-1].loss < results[0].loss  # the batch is always the same


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("plain", [False, True])
def test_a_round_of_transformers_learns(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    losses = []
    whole = torch.nn.functional.cross_entropy

    def spied(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = whole(logits, labels)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spied)
    run = training.make_hf_round("S", "fp32", plain=plain)
    for _ in range(20):
        run()
    assert len(losses) == 20
    assert losses[-1] < losses[0]


def test_scaling_is_drawn(tmp_path: Path) -> None:
    rows = [
        Row(f"S.bf16.scaling.n{n}_k{k}_vs_predicted", Measure(1, 0), None, Measure(n + k, 0), Measure(n * k, 0))
        for n, k in training.NUMBERS
    ]
    panels = training.scaling_panels(rows)
    assert panels == {
        "experts n (K = 4; S, bf16)": {1: (5, 4), 3: (7, 12), 7: (11, 28)},
        "stitch layers K (n = 3; S, bf16)": {1: (4, 3), 2: (5, 6), 4: (7, 12), 8: (11, 24)},
    }
    draw_scaling(panels, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 5000
