"""The CPU suite's training steps: a dense model and a stitched one against transformers' dense model.

All train on the same random batch with the same optimizer (`MasterAdamW`: float32 masters), clipped gradients and the
loss of every position, in the same precision: ours by `train_step`, which is what `tools/train.py` runs, with
element-wise work compiled; transformers' eagerly. Two are not quite the same: `hf_plain` is the step as its users may
write it, with torch's fused AdamW on the weights themselves, which in bfloat16 is less work and less exact, and has no
line; and in fp32 our stitched step runs a second time with its frozen members held in bfloat16 (`precision.frozen`).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from megabts.benchmark.contestants import Contestant, Round
from megabts.benchmark.shapes import (
    BATCH,
    DTYPES,
    LENGTH,
    NUM_EXPERTS,
    SHAPES,
    make_bts,
    make_dense,
    make_llama,
    stitching,
)
from megabts.benchmark.suite import Line, Row, Settings
from megabts.benchmark.timing import Measure, interleaved, measure_of, ratio_of
from megabts.bts.flops import bts_flops
from megabts.bts.plan import stitch_plan
from megabts.config.run import OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megabts.data.loader import Batch
from megabts.model.decoder import Model
from megabts.model.flops import dense_flops
from megabts.model.torch_backend import TorchBackend
from megabts.optimizer.adamw import MasterAdamW
from megabts.optimizer.clip import clip_gradients
from megabts.optimizer.stability import SpikeGuard
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import ParamMeta
from megabts.runtime.fusion import can_compile, compiled, eager
from megabts.runtime.memory import keep_freed_memory
from megabts.runtime.progress import Progress
from megabts.train.stages import Stages
from megabts.train.step import train_step

_MIXED = "bts_bf16_members"
LINES = {
    "S": {"fp32": {"dense": 1.1, "bts": 0.55}, "bf16": {"dense": 1.5, "bts": 0.8}},
    "M": {"fp32": {"dense": 1.1, "bts": 0.55}, "bf16": {"dense": 1.5, "bts": 0.6}},
}
"""Tokens per second of ours, at least so many times those of transformers' dense model."""
MICRO_BATCHES = {("bts", "S", "fp32"): 4}
"""Sequences that ours runs at one time where not all: half of them, half the memory for activations."""
PEAK_GB = 0.6 * 1.9
"""Of the stitched model S in fp32: 0.6 of what the only other BTS code takes."""
ROUNDS = 9
PREDICTED = 1.25
"""Time of a stitched step, at most so many times what the count of operations predicts from the dense step."""


def training(settings: Settings) -> list[Row]:
    """Every shape and precision."""
    return [row for shape in SHAPES for precision in DTYPES for row in _training(shape, precision, settings)]


def _training(shape: str, precision: str, settings: Settings) -> list[Row]:
    makers: dict[str, Callable[[], Round]] = {
        "hf": partial(make_hf_round, shape, precision),
        "hf_plain": partial(make_hf_round, shape, precision, plain=True),
        "dense": partial(make_round, "dense", shape, precision),
        "bts": partial(make_round, "bts", shape, precision),
        "matmul": partial(make_matmul_round, precision),
    }
    if precision == "fp32":
        makers[_MIXED] = partial(make_round, _MIXED, shape, precision)
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Contestant(make, f"{name} {shape} {precision}")) for name, make in makers.items()
        }
        runs: dict[str, Callable[[], object]] = {name: contestant.run for name, contestant in contestants.items()}
        seconds = interleaved(runs, rounds=ROUNDS, warm_up=3, progress=settings.progress)
        peaks = {name: contestant.peak_bytes() for name, contestant in contestants.items()}
        for name in [name for name in contestants if name not in ("hf_plain", "matmul")]:
            contestants[name].profile(settings, f"{shape}.{precision}.{name}")
    return _rows(shape, precision, seconds, peaks)


def _rows(shape: str, precision: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> list[Row]:
    lines, place = LINES[shape][precision], f"{shape}.{precision}"
    tokens = {name: measure_of([BATCH * LENGTH / taken for taken in times]) for name, times in seconds.items()}
    dense, stitched = (operations(kind, shape) for kind in ("dense", "bts"))
    predicted = [taken * stitched / dense for taken in seconds["dense"]]
    ceiling = [MATMUL_FLOPS / taken / 1e9 for taken in seconds["matmul"]]
    reached = [dense * BATCH * LENGTH / taken / 1e9 for taken in seconds["dense"]]
    stitched_kinds = [kind for kind in ("bts", _MIXED) if kind in seconds]
    yardsticks = {
        "hf": "transformers' dense training step",
        "hf_plain": "transformers' dense training step, AdamW on its weights",
    }
    rows = [
        Row(
            f"{place}.{kind}_vs_{yardstick}" + ("" if kind == "dense" else "_dense"),
            ratio_of(seconds[yardstick], seconds[kind]),
            Line(">=", lines["dense" if kind == "dense" else "bts"]) if yardstick == "hf" else None,
            tokens[kind],
            tokens[yardstick],
            "tokens/s",
            f"{note}; our frozen members in bfloat16" if kind == _MIXED else note,
        )
        for yardstick, note in yardsticks.items()
        for kind in ("dense", *stitched_kinds)
    ]
    rows += [
        Row(f"{place}.dense_share_of_matmul", ratio_of(reached, ceiling), None, measure_of(reached),
            measure_of(ceiling), "GFLOP/s", "model operations against a 1024^3 matrix product"),
        Row(f"{place}.bts_vs_predicted", ratio_of(seconds["bts"], predicted), Line("<=", PREDICTED),
            measure_of(seconds["bts"]), measure_of(predicted), "s", "our dense step times the ratio of operations"),
        Row(f"{place}.dense_peak_vs_hf", Measure(peaks["dense"] / peaks["hf"], 0), Line("<=", 1),
            Measure(peaks["dense"] / 1e9, 0), Measure(peaks["hf"] / 1e9, 0), "GB", "memory of a fresh process"),
    ]  # fmt: skip
    for kind in stitched_kinds:
        line = Line("<=", PEAK_GB) if place == "S.fp32" else None
        rows.append(
            Row(
                f"{place}.{kind}_peak_gb",
                Measure(peaks[kind] / 1e9, 0),
                line,
                unit="GB",
                note="memory of a fresh process",
            )
        )
    return rows


NUMBERS = tuple((n, 4) for n in (1, 3, 7)) + tuple((3, k) for k in (1, 2, 8))
"""(experts n, stitch layers K) of `scaling`: n grows at K = 4, K at n = 3."""


def scaling(settings: Settings) -> list[Row]:
    """The stitched step S in bf16 as n and K grow, against our dense step times the ratio of operations."""
    names = {f"n{n}_k{k}": (n, k) for n, k in NUMBERS}
    makers: dict[str, Callable[[], Round]] = {
        "dense": partial(make_round, "dense", "S", "bf16"),
        **{name: partial(make_round, "bts", "S", "bf16", *numbers) for name, numbers in names.items()},
    }
    with ExitStack() as stack:
        contestants = {name: stack.enter_context(Contestant(make, f"scaling {name}")) for name, make in makers.items()}
        runs = {name: contestant.run for name, contestant in contestants.items()}
        seconds = interleaved(runs, rounds=7, warm_up=2, progress=settings.progress)
        for name, contestant in contestants.items():
            contestant.profile(settings, f"S.bf16.scaling.{name}")
    dense, rows = operations("dense", "S"), []
    for name, numbers in names.items():
        predicted = [taken * operations("bts", "S", *numbers) / dense for taken in seconds["dense"]]
        rows.append(
            Row(
                f"S.bf16.scaling.{name}_vs_predicted",
                ratio_of(seconds[name], predicted),
                None,
                measure_of(seconds[name]),
                measure_of(predicted),
                "s",
                "our dense step times the ratio of operations",
            )
        )
    return rows


def scaling_panels(rows: Sequence[Row]) -> dict[str, dict[int, tuple[float, float]]]:
    """`scaling`'s rows as curves: by what grows, (measured, predicted) seconds by its number."""
    found = {row.name: row for row in rows}
    steps = {numbers: found[f"S.bf16.scaling.n{numbers[0]}_k{numbers[1]}_vs_predicted"] for numbers in NUMBERS}
    pairs = {
        numbers: (row.ours.median, row.yardstick.median) for numbers, row in steps.items() if row.ours and row.yardstick
    }
    return {
        "experts n (K = 4; S, bf16)": {n: pair for (n, k), pair in pairs.items() if k == 4},
        "stitch layers K (n = 3; S, bf16)": {k: pair for (n, k), pair in pairs.items() if n == 3},
    }


def operations(kind: str, shape: str, num_experts: int = NUM_EXPERTS, num_stitch_layers: int = 0) -> float:
    """Model operations per training token, attention's as causal."""
    config = SHAPES[shape]
    if kind == "dense":
        return dense_flops(config, LENGTH).total
    bts = stitching(config, num_experts, num_stitch_layers)
    return bts_flops(config, bts, LENGTH, stitch_plan(config.num_layers, bts)).total


def make_round(
    kind: str, shape: str, precision: str, num_experts: int = NUM_EXPERTS, num_stitch_layers: int = 0
) -> Round:
    """Our training step; `kind`: dense, bts, or bts with its frozen members in bfloat16, _MIXED."""
    keep_freed_memory()
    mesh, dtype = ParallelMesh(), DTYPES[precision]
    fuse, frozen = compiled if can_compile("cpu") else eager, torch.bfloat16 if kind == _MIXED else None
    backend = TorchBackend(dtype, "cpu", mesh.tp, fuse=fuse, frozen=frozen)
    if kind == "dense":
        model: Model = make_dense(shape, backend)
    else:
        model = make_bts(shape, backend, num_experts, num_stitch_layers)
    optimizer = MasterAdamW(model.own_parameters(), OptimizerConfig(), mesh)
    stages = Stages(model, mesh, ParallelConfig(), torch.device("cpu"))
    config = RunConfig(train=TrainConfig(steps=1000))
    guard, progress, steps = SpikeGuard(), Progress(), iter(range(1000))
    size = MICRO_BATCHES.get((kind, shape, precision), BATCH)
    tokens, mask = _tokens(), np.ones((size, LENGTH), np.float32)
    batches = [
        Batch(tokens[first : first + size, :-1], tokens[first : first + size, 1:], mask, None, first)
        for first in range(0, BATCH, size)
    ]

    def run() -> None:
        train_step(stages, optimizer, guard, batches, next(steps), config, progress)

    return run


def make_hf_round(shape: str, precision: str, *, plain: bool = False) -> Round:
    """transformers' training step."""
    model = make_llama(shape, DTYPES[precision])
    model.train()
    tokens = torch.from_numpy(_tokens())
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    config = OptimizerConfig()

    def backward() -> None:
        logits = model(input_ids=inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()

    if plain:
        betas = (config.beta1, config.beta2)
        adamw = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=config.weight_decay, fused=True)

        def run() -> None:
            adamw.zero_grad()
            backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            adamw.step()
    else:
        named = [(name, parameter, ParamMeta(tuple(parameter.shape))) for name, parameter in model.named_parameters()]
        master = MasterAdamW(named, config, ParallelMesh())

        def run() -> None:
            master.gradients.zero()
            backward()
            master.gradients.sync()
            clip_gradients(master.gradients, config.clip_grad)
            master.step(config.lr)

    return run


MATMUL_FLOPS = 16 * 2 * 1024**3
"""Of one round of `make_matmul_round`."""


def make_matmul_round(precision: str) -> Round:
    """Matrix products of 1024 x 1024: what the processor can do."""
    left, right = (torch.randn(1024, 1024).to(DTYPES[precision]) for _ in range(2))

    def run() -> None:
        for _ in range(16):
            left @ right

    return run


def _tokens() -> np.ndarray:
    """The batch, with the token after each sequence, int64 [BATCH, LENGTH + 1]."""
    return np.random.default_rng(0).integers(SHAPES["S"].vocab_size, size=(BATCH, LENGTH + 1))
