"""The GPU suite: training steps in bf16 and FP8 on one GPU, the stitched one also against a plain one, and decoding.

- `dense-1b`, `dense-2.7b`: a dense model's step in sequences of 4096.
- `bts-2.7b`: the paper's model, a hub and three experts of 2.7B with four stitch layers; also as plain PyTorch does it.
- `decode-bts`: tokens per second of that model, and the share of the memory's bandwidth that reaching them takes.

Layers are torch's and, where it is installed, Transformer Engine's in bf16 and FP8. Contestants do not fit on the GPU
together, so they run one after the other, each in a process of its own; ratios are of those runs. A step's
micro-batches are the largest that fit. MFU is model operations over the time and the data sheet's dense peak, in FP8
over twice that of bf16; attention counts as causal, and in `mfu_full_attention` in full.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from megabts.benchmark.contestants import Contestant, Round
from megabts.benchmark.decode import weight_bytes
from megabts.benchmark.gpu_rounds import Work, make_decoding_round, make_model, make_plain_round, make_round, preset
from megabts.benchmark.suite import Benchmark, Line, Row, Settings
from megabts.benchmark.timing import Measure, interleaved, measure_of, ratio_of
from megabts.config.model import ModelConfig
from megabts.config.run import PrecisionConfig
from megabts.errors import UserError
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.planner.gpus import GPUS, Gpu
from megabts.runtime.device import gpu_model, have_te, peak_allocated

GPU = torch.device("cuda", 0)
TORCH, TORCH_FP8, TE, FP8, PLAIN = "torch_bf16", "torch_fp8", "te_bf16", "te_fp8", "plain"
PRECISIONS = {
    TORCH: PrecisionConfig(dtype="bfloat16"),
    TORCH_FP8: PrecisionConfig(dtype="bfloat16", fp8="current"),
    TE: PrecisionConfig(dtype="bfloat16", layers="te"),
    FP8: PrecisionConfig(dtype="bfloat16", layers="te", fp8="current"),
}
"""By the name in the results; TORCH_FP8, of frozen members alone, where there are any."""
NO_TE = "Transformer Engine is not installed: no rows of it"
MICRO_BATCHES = (4, 2, 1)
"""Sequences at one time, tried in this order until they fit."""
ROUNDS, WARM_UP = 8, 3
MFU = 0.5
"""Of bf16, with the faster layer library."""
PLAIN_SPEEDUP = 1.8
BATCHES = (1, 16, 64)
"""Of decoding."""
PROMPT, NEW = 128, 128
"""Tokens of each row, of which the first new one comes from the prompt and is not timed."""
READ_SHARE = 0.9
"""Of the data sheet's bandwidth that reading reaches at best, the limit of decoding: 4.3 TB/s on an H200."""


@dataclass(frozen=True)
class Timed:
    """What a contestant took."""

    seconds: list[float]
    """Of each round."""
    peak_bytes: int
    micro_batch: int
    """Sequences at one time."""


def train(
    settings: Settings, work: Work, fp8_line: float | None = None, plain: bool = False, device: torch.device = GPU
) -> list[Row]:
    """A training step with every layer library. `fp8_line`: what FP8 has to be in tokens of bf16; `plain`: also
    against `plain_loss`."""
    card, rounds = card_of(device), max(2, round(ROUNDS * settings.scale))
    names = [TORCH, *[TORCH_FP8] * work.stitched, *([TE, FP8] if have_te() else [])]
    if not have_te():
        settings.progress(NO_TE)
    makers: dict[str, Callable[[int], Round]] = {
        name: partial(make_round, work, PRECISIONS[name], device) for name in names
    }
    if plain:
        makers[PLAIN] = partial(make_plain_round, work, PRECISIONS[TORCH], device)
    timed = {name: measured(f"{work.place}.{name}", make, rounds, device, settings) for name, make in makers.items()}
    return training_rows(work, timed, card, fp8_line)


def measured(
    name: str,
    make: Callable[[int], Round],
    rounds: int,
    device: torch.device,
    settings: Settings,
    sizes: tuple[int, ...] = MICRO_BATCHES,
) -> Timed:
    """Rounds of `make(sequences at one time)` in a process of its own, with the first of `sizes` that fits.

    `name`: of its rows, and so of its profile.

    Raises UserError when none does, or when it fails otherwise.
    """
    for size in sizes:
        try:
            with Contestant(partial(make, size), name, peak=partial(peak_allocated, device)) as contestant:
                seconds = interleaved({name: contestant.run}, rounds, WARM_UP, settings.progress)[name]
                took = Timed(seconds, contestant.peak_bytes(), size)
                contestant.profile(settings, name)
                return took
        except UserError as error:
            if "out of memory" not in str(error) or size == sizes[-1]:
                raise
            settings.progress(f"{name}: {size} at one time do not fit")
    raise AssertionError("no sizes")


def training_rows(work: Work, timed: Mapping[str, Timed], card: Gpu, fp8_line: float | None) -> list[Row]:
    """Rows from what the contestants took."""
    rows = []
    for name, took in timed.items():
        place, speed = f"{work.place}.{name}", _speed(work, took)
        rows += [
            Row(f"{place}.tokens_per_second", speed, unit="tokens/s", note=f"micro-batches of {took.micro_batch}"),
            Row(f"{place}.mfu", _mfu(work, name, took, card), note="attention as causal"),
            Row(f"{place}.mfu_full_attention", _mfu(work, name, took, card, causal=False)),
            Row(f"{place}.peak_gb", Measure(took.peak_bytes / 1e9, 0.0), unit="GB", note="of tensors"),
        ]
    best = min((name for name in (TORCH, TE) if name in timed), key=lambda name: median(timed[name].seconds))
    note = best if TE in timed else f"{best}; {NO_TE}"
    rows.append(Row(f"{work.place}.bf16_mfu", _mfu(work, best, timed[best], card), Line(">=", MFU), note=note))
    pairs = (
        ("fp8_vs_bf16", FP8, best, fp8_line),
        ("torch_fp8_vs_bf16", TORCH_FP8, TORCH, None),
        ("bf16_vs_plain", best, PLAIN, PLAIN_SPEEDUP),
    )
    for name, ours, yardstick, bound in pairs:
        if ours in timed and yardstick in timed:
            value = ratio_of(timed[yardstick].seconds, timed[ours].seconds)
            line = None if bound is None else Line(">=", bound)
            speeds = _speed(work, timed[ours]), _speed(work, timed[yardstick])
            rows.append(Row(f"{work.place}.{name}", value, line, *speeds, "tokens/s", f"{ours} against {yardstick}"))
    return rows


def _speed(work: Work, took: Timed) -> Measure:
    return measure_of([work.tokens / seconds for seconds in took.seconds])


def _mfu(work: Work, name: str, took: Timed, card: Gpu, *, causal: bool = True) -> Measure:
    peak = card.bf16 * (2 if name in (FP8, TORCH_FP8) else 1)
    return measure_of([work.operations(causal=causal) / seconds / peak for seconds in took.seconds])


def decode(settings: Settings, model: ModelConfig, device: torch.device = GPU) -> list[Row]:
    """Greedy decoding of the stitched model with torch's layers, its steps recorded as CUDA graphs, and not."""
    card, new, rounds = card_of(device), max(3, round(NEW * settings.scale)), max(2, round(ROUNDS * settings.scale))
    rows = []
    for batch in BATCHES:
        place, timed = f"decode_bts.batch_{batch}", list[Timed]()
        for name, graphs in ((place, True), (f"{place}_eager", False)):
            make = partial(make_decoding_round, model, PRECISIONS[TORCH], device, PROMPT, new, graphs)
            timed.append(measured(name, make, rounds, device, settings, sizes=(batch,)))
            rows += decode_rows(name, read_bytes(model), batch, new, timed[-1], card)
        recorded, eager = (took.seconds for took in timed)
        rows.append(Row(f"{place}_graphs_vs_eager", ratio_of(eager, recorded), note="CUDA graphs against launches"))
    return rows


def decode_rows(place: str, step_bytes: int, batch: int, new: int, took: Timed, card: Gpu) -> list[Row]:
    """Rows from what generating `new` tokens for each of `batch` took; a step reads `step_bytes` of weights."""
    limit = card.memory_bandwidth * READ_SHARE
    steps = [seconds / (new - 1) for seconds in took.seconds]
    note = f"the weights that a step reads, at {limit / 1e12:.3g} TB/s"
    return [
        Row(f"{place}.tokens_per_second", measure_of([batch / step for step in steps]), unit="tokens/s"),
        Row(f"{place}.bandwidth_share", measure_of([step_bytes / limit / step for step in steps]), note=note),
        Row(f"{place}.peak_gb", Measure(took.peak_bytes / 1e9, 0.0), unit="GB", note="of tensors"),
    ]


def read_bytes(model: ModelConfig) -> int:
    """Weights of the stitched model in bf16 that a step of decoding reads, bytes."""
    return weight_bytes(make_model(model, True, TorchBackend(torch.bfloat16, "meta", ParallelMesh().tp)))


def card_of(device: torch.device) -> Gpu:
    """The GPU's data sheet. Raises UserError for one that is not known."""
    name = gpu_model(device)
    found = [card for key, card in GPUS.items() if key.split("-")[0].upper() in name]
    if not found:
        raise UserError(f"the peaks of {name} are not known; run the gpu suite on one of {', '.join(GPUS)}")
    return found[0]


BENCHMARKS = (
    Benchmark("dense-1b", partial(train, work=Work("dense_1b", preset("1b"), False)), gpu=True),
    Benchmark(
        "dense-2.7b", partial(train, work=Work("dense_2_7b", preset("paper-2.7b"), False), fp8_line=1.25), gpu=True
    ),
    Benchmark(
        "bts-2.7b",
        partial(train, work=Work("bts_2_7b", preset("paper-2.7b"), True), fp8_line=1.3, plain=True),
        gpu=True,
    ),
    Benchmark("decode-bts", partial(decode, model=preset("paper-2.7b")), gpu=True),
)
