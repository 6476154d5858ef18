"""Runs that do not fit their ranks are refused with the arithmetic, and those that fit are not."""

from dataclasses import replace
from typing import Any

import pytest

from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.config.run import DataConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from megabts.errors import UsageError
from megabts.parallel.layout import check_layout, num_microbatches

SIZES: dict[str, Any] = {"hidden_size": 48, "num_layers": 4, "num_heads": 12, "num_kv_heads": 3, "ffn_size": 96}


def run(
    parallel: dict[str, Any],
    model: dict[str, Any] | None = None,
    batch: tuple[int, int] = (8, 1),
    experts: int = 0,
    seq: int = 64,
) -> RunConfig:
    bts = BTSConfig("hub", {f"e{i}": f"e{i}" for i in range(experts)})
    return RunConfig(
        method="bts" if experts else "dense",
        model=ModelConfig(**{**SIZES, "vocab_size": 100, **(model or {})}),
        bts=bts,
        parallel=ParallelConfig(**parallel),
        data=DataConfig(seq_length=seq),
        train=TrainConfig(global_batch=batch[0], micro_batch=batch[1]),
    )


@pytest.mark.parametrize(
    "config, world",
    [
        (run({"tensor": 3, "sequence": True}, seq=63), 3),
        (run({"tensor": 6}), 6),
        (run({"tensor": 12, "pipeline": 2}, {"vocab_size": 101}), 48),
        (run({"pipeline": 2, "chunks": 2, "schedule": "interleaved"}, batch=(8, 2)), 2),
        (run({"pipeline": 6, "cuts": [0, 1, 2, 3, 4]}), 6),
        (run({"expert": 3, "tensor": 2}, {"num_kv_heads": 4}, experts=3), 12),
    ],
)
def test_what_fits_is_let_through(config: RunConfig, world: int) -> None:
    check_layout(config, world)


@pytest.mark.parametrize(
    "config, world, message",
    [
        (run({"tensor": 2}), 3, "parallel.tensor 2 = 2 does not divide the 3 ranks"),
        (
            run({"tensor": 8}),
            8,
            r"model.num_heads 12 does not divide among parallel.tensor 8 ranks; .*1, 2, 3, 4, 6, 12",
        ),
        (run({"tensor": 2}), 2, r"tensor 2 neither divides model.num_kv_heads 3 nor is a multiple"),
        (run({"tensor": 3}, {"ffn_size": 100}), 3, "model.ffn_size 100 does not divide"),
        (run({"tensor": 6}, {"vocab_size": 5}), 6, "model.vocab_size 5 in blocks of 1 is used up"),
        (run({"tensor": 3, "sequence": True}), 3, "data.seq_length 64 does not divide among parallel.tensor 3"),
        (
            run({"sequence": True}),
            2,
            "parallel.sequence is true, but parallel.tensor is 1 .*; set parallel.sequence false",
        ),
        (run({"expert": 2}), 2, "parallel.expert is 2, but a dense model has no experts"),
        (run({"expert": 4}, experts=2), 4, r"parallel.expert 4 is more than the 3 members \(hub, e0, e1\)"),
        (run({}, batch=(8, 3)), 2, "train.global_batch 8 is not a multiple of train.micro_batch 3 x 2 .* = 6"),
        (
            run({"pipeline": 2, "cuts": [5]}),
            2,
            r"cuts is \[5\]; 2 stages of 4 layers need as many cuts as boundaries \(1\), ascending from 0 to 4",
        ),
        (run({"pipeline": 7}), 7, r"pipeline 7 x parallel.chunks 1 = 7 stages are more than 4 layers"),
        (
            run({"pipeline": 2, "chunks": 2, "schedule": "interleaved"}, batch=(3, 1)),
            2,
            "multiples of parallel.pipeline 2; train.global_batch 3 / train.micro_batch 1 / 1 .* = 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(config: RunConfig, world: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_layout(config, world)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tensor": 0}, "parallel.tensor is 0; it must be at least 1"),
        ({"pipeline": 0}, "parallel.pipeline is 0; it must be at least 1"),
        ({"expert": 0}, "parallel.expert is 0; it must be at least 1"),
        ({"pipeline": 2, "schedule": "interleaved"}, "needs several layer chunks a rank; set parallel.chunks"),
        ({"chunks": 2}, "chunks is 2, which needs parallel.schedule interleaved"),
        ({"pipeline": 3, "cuts": [1]}, r"cuts is \[1\]; 3 stages .* need as many cuts as boundaries \(2\)"),
        ({"pipeline": 3, "cuts": [2, 1]}, "ascending"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ParallelConfig(**settings)


def test_micro_batches_are_counted_per_rank() -> None:
    assert num_microbatches(run({}, batch=(24, 2)), 3) == 4


def test_a_dtype_of_frozen_members_needs_some() -> None:
    config = replace(run({}), precision=PrecisionConfig(frozen="bfloat16"))
    with pytest.raises(UsageError, match="is for frozen members, and method dense has none; leave it at same"):
        check_layout(config, 1)
    check_layout(replace(run({}, experts=2), precision=PrecisionConfig(frozen="bfloat16")), 1)


def fp8_run(
    fp8: str, parallel: dict[str, Any], experts: int = 0, seq: int = 64, layers: str = "te", **sizes: Any
) -> RunConfig:
    """Sizes that FP8 can take on one rank: 16 heads of 16, two of them keys."""
    fitting = {"hidden_size": 256, "num_heads": 16, "num_kv_heads": 2, "ffn_size": 512, **sizes}
    config = run(parallel, fitting, experts=experts, seq=seq)
    return replace(config, precision=PrecisionConfig(layers=layers, fp8=fp8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config, world",
    [
        (fp8_run("current", {}), 1),
        (fp8_run("delayed", {"tensor": 4, "sequence": True}), 4),
        (fp8_run("block", {"tensor": 2, "sequence": True}, seq=256), 2),
        (fp8_run("current", {"tensor": 4}, experts=2), 4),
        # of torch: the stitches are not in FP8, and a sequence is whole when it is rounded
        (fp8_run("current", {"tensor": 2}, experts=2, hidden_size=272, head_dim=16, layers="torch"), 2),
        (fp8_run("current", {"tensor": 8, "sequence": True}, experts=2, layers="torch"), 8),
    ],
)
def test_what_fp8_can_take_is_let_through(config: RunConfig, world: int) -> None:
    check_layout(config, world)


@pytest.mark.parametrize(
    "config, world, message",
    [
        (
            fp8_run("current", {}, ffn_size=520),
            1,
            "multiples of 16 on every rank, and model.ffn_size 520 / parallel.tensor 1 = 520",
        ),
        (fp8_run("delayed", {"tensor": 2}, ffn_size=48), 2, "model.ffn_size 48 / parallel.tensor 2 = 24"),
        (fp8_run("current", {}, head_dim=4, num_kv_heads=1, num_heads=4), 1, "6 query, key and value heads of 4 = 24"),
        (fp8_run("current", {}, seq=63), 1, "train.micro_batch 1 x data.seq_length 63 / 1 slices = 63"),
        (fp8_run("current", {"tensor": 8, "sequence": True}), 8, "data.seq_length 64 / 8 slices = 8"),
        (fp8_run("block", {"tensor": 2, "sequence": True}), 2, "block needs multiples of 128 .* 2 slices = 32"),
        (
            fp8_run("current", {"tensor": 2}, experts=2, hidden_size=272, head_dim=16),
            2,
            "hidden_size 272 / parallel.tensor 2 = 136",
        ),
        (fp8_run("current", {}, layers="torch"), 1, "is for frozen members, and method dense has none; set"),
        (fp8_run("current", {}, experts=2, seq=63, layers="torch"), 1, "63 / 1 slices = 63"),
    ],
)
def test_what_fp8_cannot_take_is_refused(config: RunConfig, world: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_layout(config, world)
