"""The data suite: tokenizing, indexing, loading.

- `preprocess`: tools/preprocess_data.py with all cores, against the loop over documents that Megatron-LM runs (one
  process), and against the tokenizer's library alone, which reads and writes nothing.
- `preprocess-1gb`: the same tool on the text repeated to 1 GB, by its rate; the yardsticks take time in proportion to
  the text, so they are measured on one repetition.
- `indexing`: what a run builds before its first step, for 10 million documents and samples.
- `loader`: reading a step's batch, against the training step of a small dense model.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megabts.benchmark.data_text import Text, library_encoders, prepare_text, preprocess_by_document
from megabts.benchmark.shapes import BATCH, LENGTH, SHAPES
from megabts.benchmark.suite import Benchmark, Line, Row, Settings
from megabts.benchmark.timing import Measure, interleaved, measure_of, ratio_of
from megabts.config.model import ModelConfig
from megabts.config.run import DataConfig, PrecisionConfig, RunConfig, TrainConfig
from megabts.data.blend import blend_index
from megabts.data.index_file import optimal_dtype
from megabts.data.indexed import IndexedDatasetBuilder
from megabts.data.samples import build_sample_indices, normalise
from megabts.errors import UserError
from megabts.optimizer.stability import SpikeGuard
from megabts.parallel.mesh import build_mesh
from megabts.runtime.cores import num_cores
from megabts.runtime.device import Launch, pick_device
from megabts.runtime.progress import Progress
from megabts.train.setup import build_run
from megabts.train.step import train_step

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
_GIGABYTE = 1_000_000_000
_NUM_DOCUMENTS = 10_000_000
_TOKENS_PER_DOCUMENT = 256
_BLENDED = 8
_MEGABYTE = 1e6


def preprocess(settings: Settings) -> list[Row]:
    """The tool on about 30 MB of text, with its start and end."""
    return _preprocess(settings, "preprocess", 1, rounds=5, warm_up=1)


def preprocess_gigabyte(settings: Settings) -> list[Row]:
    """The tool on 1 GB."""
    return _preprocess(settings, "preprocess_1gb", _GIGABYTE, rounds=3, warm_up=0)


def _preprocess(settings: Settings, name: str, num_bytes: int, rounds: int, warm_up: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="megabts-benchmark-") as temporary:
        folder = Path(temporary)
        text = prepare_text(settings, folder)
        repeats = max(1, round(num_bytes * settings.scale / text.num_bytes))
        _check_disk(folder, (2 * repeats + 2) * text.num_bytes)
        corpus = _repeat(text.path, folder / "repeated.jsonl", repeats) if repeats > 1 else text.path
        encode_all = library_encoders(text.tokenizer)[1]
        contestants: dict[str, Callable[[], object]] = {
            "tool": lambda: _run_tool(corpus, text, folder / "ours"),
            "per document": lambda: preprocess_by_document(text.path, text.tokenizer, str(folder / "theirs")),
            "bare tokenizer": lambda: encode_all(text.texts),
        }
        seconds = interleaved(contestants, rounds, warm_up, settings.progress)
    return _preprocess_rows(name, text.num_bytes, repeats, seconds)


def _preprocess_rows(name: str, num_bytes: int, repeats: int, seconds: dict[str, list[float]]) -> list[Row]:
    ours = [taken / repeats for taken in seconds["tool"]]
    documents, bare = seconds["per document"], seconds["bare tokenizer"]

    def rate(taken: list[float]) -> Measure:
        return measure_of([num_bytes / _MEGABYTE / second for second in taken])

    per_core = measure_of([num_bytes / _MEGABYTE / num_cores() / second for second in ours])
    amount = f"of {repeats * num_bytes / _MEGABYTE:.0f} MB"
    return [
        Row(f"{name}_mb_per_s_per_core", per_core, unit="MB/s", note=amount),
        Row(
            f"{name}_vs_per_document",
            ratio_of(documents, ours),
            Line(">=", 3),
            ours=rate(ours),
            yardstick=rate(documents),
            unit="MB/s",
            note="times the speed of a loop over documents, one process",
        ),
        Row(
            f"{name}_vs_bare_tokenizer",
            ratio_of(ours, bare),
            Line("<=", 1.3),
            ours=rate(ours),
            yardstick=rate(bare),
            unit="MB/s",
            note="times the seconds of the tokenizer's library, all cores",
        ),
    ]


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free / _GIGABYTE:.1f} GB free, {needed / _GIGABYTE:.1f} are needed; set TMPDIR to "
            "another folder"
        )


def _repeat(source: Path, target: Path, times: int) -> Path:
    with open(target, "wb") as out:
        for _ in range(times):
            with open(source, "rb") as text:
                shutil.copyfileobj(text, out, 1 << 22)
    return target


def _run_tool(corpus: Path, text: Text, prefix: Path) -> None:
    """As a user calls it, its start included."""
    flags = ["--input", str(corpus), "--output-prefix", str(prefix), "--tokenizer", text.spec, "--append-eod"]
    done = subprocess.run([sys.executable, str(_TOOL), *flags], capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["tools/preprocess_data.py failed"])[-1])


def indexing(settings: Settings) -> list[Row]:
    """Index arrays of one dataset, and a blend of several."""
    size = max(round(_NUM_DOCUMENTS * settings.scale), 100)
    lengths = np.random.default_rng(0).integers(1, 2 * _TOKENS_PER_DOCUMENT, size, dtype=np.int32)
    numbers = np.arange(size, dtype=np.int32)
    shares = normalise(list(range(1, _BLENDED + 1)))
    contestants: dict[str, Callable[[], object]] = {
        "samples": lambda: build_sample_indices(lengths, numbers, _TOKENS_PER_DOCUMENT, size, 1234),
        "blend": lambda: blend_index(shares, size),
    }
    seconds = interleaved(contestants, 3, 0, settings.progress)
    total = measure_of([samples + blend for samples, blend in zip(*seconds.values(), strict=True)])
    return [
        Row("indexing_seconds", total, Line("<=", 30), unit="s", note=f"{size:,} documents and samples"),
        Row("indexing_samples_seconds", measure_of(seconds["samples"]), unit="s", note="one dataset's arrays"),
        Row("indexing_blend_seconds", measure_of(seconds["blend"]), unit="s", note=f"a blend of {_BLENDED} datasets"),
    ]


TRAIN = TrainConfig(steps=1000, micro_batch=BATCH, global_batch=BATCH)
"""The training whose steps loading is compared with."""


def loader(
    settings: Settings, model: ModelConfig = SHAPES["S"], train: TrainConfig = TRAIN, length: int = LENGTH
) -> list[Row]:
    """A step's batch, read while nothing else runs; in training it is read during the step before."""
    with tempfile.TemporaryDirectory(prefix="megabts-benchmark-") as folder:
        config = RunConfig(
            model=model,
            data=DataConfig(train={_random_dataset(folder, model.vocab_size): 1}, seq_length=length),
            train=train,
            precision=PrecisionConfig(dtype="bfloat16"),
        )
        return _loader_rows(config, settings)


def _random_dataset(folder: str, vocab_size: int) -> str:
    """Documents of random tokens and lengths, enough for the steps that are run. Returns the prefix."""
    rng = np.random.default_rng(0)
    prefix = os.path.join(folder, "random")
    lengths = rng.integers(1, 2 * _TOKENS_PER_DOCUMENT, 20_000)
    dtype = optimal_dtype(vocab_size)
    tokens = rng.integers(0, vocab_size, lengths.sum(), dtype=dtype.type)
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        builder.add_documents(tokens, lengths, np.ones_like(lengths))
        builder.finalize()
    return prefix


def _loader_rows(config: RunConfig, settings: Settings) -> list[Row]:
    run = build_run(config, build_mesh(config.parallel, 1, 0), pick_device(Launch()), None)
    guard, progress = SpikeGuard(sigma=config.optimizer.skip_sigma), Progress()
    consumed = itertools.count(0, config.train.global_batch)
    batches = run.loader.step_batches(0)
    seconds = interleaved(
        {
            "batch": lambda: run.loader.step_batches(next(consumed)),
            "step": lambda: train_step(run.stages, run.optimizer, guard, batches, 0, config, progress),
        },
        max(round(20 * settings.scale), 3),
        2,
        settings.progress,
    )
    batch, step = (measure_of([1e3 * second for second in seconds[name]]) for name in ("batch", "step"))
    share = ratio_of(seconds["batch"], seconds["step"])
    note = f"reading {config.train.global_batch} x {config.data.seq_length} tokens, as a share of the training step"
    return [Row("loader_share_of_step", share, Line("<=", 0.01), batch, step, "ms", note)]


BENCHMARKS = (
    Benchmark("preprocess", preprocess),
    Benchmark("preprocess-1gb", preprocess_gigabyte),
    Benchmark("indexing", indexing),
    Benchmark("loader", loader),
)
