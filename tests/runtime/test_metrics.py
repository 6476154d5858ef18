"""Log lines, metrics.jsonl and TensorBoard, read back by independent readers."""

import io
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megabts.errors import UserError
from megabts.runtime.log import configure_logging
from megabts.runtime.metrics import MetricsLogger, Rates, StepStats, read_metrics


@pytest.fixture(autouse=True)
def logging_to_stdout() -> Iterator[None]:
    logger = logging.getLogger("megabts")
    before = (list(logger.handlers), logger.level, logger.propagate)
    configure_logging(0)
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def stats(step: int, steps: int = 2000, **changes: Any) -> StepStats:
    values: dict[str, Any] = {
        "loss": 2.3145 + step / 3,
        "lr": 3e-4,
        "grad_norm": 0.82,
        "tokens": 81_200,
        "seconds": 1.0,
        "flops": 2 * 412e12,
        "consumed_samples": 8 * step,
        "memory_bytes": int(61.2 * 2**30),
        "memory_total_bytes": 80 * 2**30,
        "data_seconds": 0.004,
    }
    return StepStats(step=step, steps=steps, **(values | changes))


def make(run_dir: Path | None, **changes: Any) -> MetricsLogger:
    settings: dict[str, Any] = {
        "tensorboard": False,
        "every": 1,
        "world_size": 2,
        "peak_flops": 989e12,
        "progress": False,
        "total_steps": 5,
        "start_step": 0,
    }
    return MetricsLogger(run_dir, **(settings | changes))


def test_line_in_full() -> None:
    rates = Rates(world_size=2, peak_flops=989e12)
    rates.add(stats(119))
    rates.add(stats(120, loss=2.3145))
    assert rates.line(stats(120, loss=2.3145)) == (
        "step 120/2000 | loss 2.3145 | lr 3.0e-04 | gnorm 0.82 | tok/s 81.2k (40.6k/gpu) | 412 TFLOP/s/gpu | MFU 41.7% "
        "| mem 61.2/80 GiB | data 0.4% | eta 00:31:20"
    )


def test_line_of_one_cpu_rank_without_known_peak() -> None:
    rates = Rates(world_size=1, peak_flops=None, device="rank")
    one = stats(1, flops=52.34e9, tokens=950, memory_total_bytes=0, skipped_steps=2)
    rates.add(one)
    line = rates.line(one)
    assert "| tok/s 950 | 52.3 GFLOP/s/rank | MFU N/A | mem 61.2 GiB |" in line
    assert line.endswith("eta --:--:-- | skipped 2")
    routed = stats(1, extra={"moe/entropy": 1.0986, "moe/dead": 2, "moe/layer_00/dead": 2})
    assert rates.line(routed).endswith("eta --:--:-- | router entropy 1.099 | dead ffn experts 2")
    mixed = stats(1, extra={"moe/attention_entropy": 0.5, "moe/attention_dead": 0})
    assert rates.line(mixed).endswith("--:--:-- | attention router entropy 0.500 | dead attention experts 0")


def test_first_step_does_not_count_in_rates_and_eta() -> None:
    rates = Rates(world_size=1, peak_flops=None)
    rates.add(stats(1, seconds=500.0))
    rates.add(stats(2, seconds=2.0, tokens=100))
    rates.add(stats(3, seconds=3.0, tokens=100))
    assert rates.tokens_per_second == 40.0
    assert rates.eta(stats(3, steps=1443)) == "01:00:00"
    assert rates.eta(stats(1443, steps=1443)) == "00:00:00"


def test_lines_come_every_n_steps_and_first_and_last(capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(None, every=3, total_steps=8)
    for step in range(1, 9):
        logger.log_step(stats(step, 8))
    logger.close()
    assert [line.split(" |")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step {step}/8" for step in (1, 3, 6, 8)
    ]


def test_jsonl_keeps_floats_exactly(tmp_path: Path) -> None:
    logger = make(tmp_path)
    loss = 1 / 3 + 1e-16
    logger.log_step(stats(1, loss=loss, extra={"stitch_gate/2/code": 0.25}))
    logger.log_step(stats(2, loss=math.nan))
    logger.log_valid(2, {"code": 2.5, "math": math.inf}, 16)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed: the logger is still open
    logger.close()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["loss"].hex() == loss.hex()
    assert rows[0]["stitch_gate/2/code"] == 0.25
    assert rows[1]["loss"] is None
    assert rows[2] == {"step": 2, "consumed_samples": 16, "valid": {"code": 2.5, "math": None}}
    steps, valid = read_metrics(tmp_path)
    assert [row["step"] for row in steps] == [1, 2]
    assert math.isnan(steps[1]["loss"])
    assert math.isnan(valid[0]["valid"]["math"])


def test_resumed_run_is_one_curve(tmp_path: Path) -> None:
    killed = make(tmp_path)
    for step in range(1, 5):
        killed.log_step(stats(step))
        killed.log_valid(step, {"code": float(step)}, 8 * step)
    killed.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = make(tmp_path, start_step=2)
    for step in range(3, 6):
        resumed.log_step(stats(step, loss=100.0 + step))
    resumed.close()
    steps, valid = read_metrics(tmp_path)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in steps[2:]] == [103.0, 104.0, 105.0]
    assert [row["step"] for row in valid] == [1, 2]


def test_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    for losses in ([1.0, 2.0], [3.0]):
        logger = make(tmp_path)
        for step, loss in enumerate(losses, start=1):
            logger.log_step(stats(step, loss=loss))
        logger.close()
    assert [row["loss"] for row in read_metrics(tmp_path)[0]] == [3.0]


def test_reader_passes_over_a_damaged_end_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "los\xff')
    assert read_metrics(tmp_path) == ([{"step": 1, "loss": 2.0}], [])
    path.write_bytes(b'{"step": 1}\n[3]\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is damaged"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "none")


def test_tensorboard_has_megatrons_tags_and_survives_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = make(tmp_path, tensorboard=True)
    for step in range(1, 5):
        killed.log_step(stats(step, loss=float(step)))
    killed.log_valid(4, {"code": 9.0}, 32)
    killed.close()
    resumed = make(tmp_path, tensorboard=True, start_step=2)
    for step in range(3, 6):
        resumed.log_step(stats(step, loss=10.0 * step, extra={"stitch_gate/2/code": 0.5}))
    resumed.log_valid(5, {"code": 2.0, "math": 4.0}, 40)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(tag)]

    losses = [1.0, 2.0, 30.0, 40.0, 50.0]
    assert curve("lm loss") == list(zip(range(1, 6), losses, strict=True))
    assert curve("lm loss vs samples") == list(zip(range(8, 48, 8), losses, strict=True))
    assert curve("lm loss validation") == [(5, 3.0)]
    assert curve("lm loss validation ppl") == [(5, pytest.approx(math.exp(3.0)))]
    assert curve("expert_loss/code") == [(5, 2.0)]
    assert curve("expert_loss/math") == [(5, 4.0)]
    assert curve("batch-size") == [(1, 8.0), (2, 8.0), (4, 8.0), (5, 8.0)]
    assert curve("throughput")[0] == (1, pytest.approx(412.0))
    assert curve("stitch_gate/2/code")[0] == (3, 0.5)
    for tag in ("learning-rate", "grad-norm", "iteration-time", "mem-reserved-bytes"):
        assert [step for step, _ in curve(tag)] == [1, 2, 3, 4, 5]


def test_progress_without_a_terminal_is_a_line_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(None, progress=True, total_steps=50)
    for step in range(1, 51):
        logger.log_step(stats(step, 50))
    logger.close()
    steps = [line.split("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["step 1", *(f"step {step}" for step in range(5, 51, 5))]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    logger = make(None, progress=True, total_steps=4)
    for step in range(1, 5):
        logger.log_step(stats(step, 4, loss=1.2345))
    logger.log_valid(4, {"code": 2.0}, 32)
    logger.close()
    shown = terminal.getvalue()
    assert "4/4" in shown
    assert "loss 1.2345 | tok/s 81.2k" in shown
    assert "valid at step 4 | code 2.0000" in shown
    assert "gnorm" not in shown
