"""Greedy decoding on CPU: tokens per second after the prompt, ours against transformers'.

Four contestants, each a process: our engine with a dense model; with a stitched one of four members of that shape; a
loop over transformers' dense model with its DynamicCache, which does nothing but take the likeliest token; and (for one
row) reading a buffer as large as all weights that a token of the stitched model reads. That buffer's time over a
token's is the share of the memory bandwidth that decoding reaches: at this size, since caches differ by size.
"""

import time
from functools import partial

import torch
from torch import nn
from torch.profiler import record_function

from megabts.benchmark.contestants import Contestant, Round
from megabts.benchmark.shapes import DTYPES, SHAPES, make_bts, make_dense, make_llama
from megabts.benchmark.suite import Benchmark, Line, Row, Settings
from megabts.benchmark.timing import Measure, interleaved, measure_of, ratio_of
from megabts.inference.engine import Engine
from megabts.inference.rows import Request
from megabts.inference.settings import GenerationSettings
from megabts.model.decoder import Model
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh

PROMPT = 128
"""Tokens of each row's prompt, at random."""
NEW = 128
"""Tokens that are generated, of which the first comes from the prompt and is not timed."""
BATCHES = (1, 16)
_ROUNDS = 7
_DENSE, _BTS, _HF, _READ = "dense", "bts", "hf", "read"
_LINES = {("S", "dense"): 1.5, ("M", "dense"): 1.5, ("S", "bts"): 0.7}
"""Of one row; at M the stitched model is measured by the bandwidth."""
_SHARE = 0.7


def decode(settings: Settings, shape: str, dtype: str, batch: int) -> list[Row]:
    """The rows of one shape, number format and batch."""
    new = max(3, round(NEW * settings.scale))
    makers = {
        _DENSE: partial(engine_round, False, shape, dtype, batch, new),
        _BTS: partial(engine_round, True, shape, dtype, batch, new),
        _HF: partial(transformers_round, shape, dtype, batch, new),
    }
    if batch == 1:
        makers[_READ] = partial(reading_round, shape, dtype, new)
    place = f"{shape}.{dtype}.decode" + (f"_{batch}" if batch > 1 else "")
    contestants: dict[str, Contestant] = {}
    try:
        for name, make in makers.items():
            contestants[name] = Contestant(make, f"decode {name} {shape} {dtype}")
        runs = {name: contestant.run for name, contestant in contestants.items()}
        seconds = interleaved(runs, _ROUNDS, 1, settings.progress)
        for name in (_DENSE, _BTS, _HF):
            contestants[name].profile(settings, f"{place}_{name}")
    finally:
        for contestant in contestants.values():
            contestant.close()
    return decode_rows(place, shape, batch, new, seconds)


def decode_rows(name: str, shape: str, batch: int, new: int, seconds: dict[str, list[float]]) -> list[Row]:
    """Rows from the contestants' seconds a round."""

    def speed(contestant: str) -> Measure:
        return measure_of([batch * (new - 1) / taken for taken in seconds[contestant]])

    rows = []
    for kind, yardstick in ((_DENSE, "hf"), (_BTS, "hf_dense")):
        bound = _LINES.get((shape, kind)) if batch == 1 else None
        line = None if bound is None else Line(">=", bound)
        value, note = ratio_of(seconds[_HF], seconds[kind]), "transformers, one dense member"
        rows.append(Row(f"{name}_{kind}_vs_{yardstick}", value, line, speed(kind), speed(_HF), "tokens/s", note))
    if _READ in seconds:
        line = Line(">=", _SHARE) if shape == "M" else None
        note = "reading as many bytes as a token's weights"
        share = ratio_of(seconds[_READ], seconds[_BTS])
        rows.append(Row(f"{name}_bts_bandwidth_share", share, line, speed(_BTS), speed(_READ), "tokens/s", note))
    return rows


def engine_round(stitched: bool, shape: str, dtype: str, batch: int, new: int) -> Round:
    """Our engine; a round returns the seconds of all steps after the prompts'."""
    backend = TorchBackend(DTYPES[dtype], "cpu", ParallelMesh().tp)
    return decoding_round(make_bts(shape, backend) if stitched else make_dense(shape, backend), batch, PROMPT, new)


def decoding_round(model: Model, batch: int, prompt: int, new: int, *, cuda_graphs: bool = True) -> Round:
    """`new` tokens for each of `batch` random prompts; a round returns the seconds of all steps after the prompts'."""
    engine = Engine(model, batch, batch * (prompt + new), prefill_tokens=batch * prompt, cuda_graphs=cuda_graphs)
    requests = [
        Request(tokens, GenerationSettings(new)) for tokens in prompts(model.config.vocab_size, batch, prompt).tolist()
    ]

    def run() -> float:
        for request in requests:
            engine.submit(request)
        with record_function("prompts"):
            engine.step()
        start = time.perf_counter()
        with record_function("steps"):
            while engine.busy:
                engine.step()
        return time.perf_counter() - start

    return run


def transformers_round(shape: str, dtype: str, batch: int, new: int) -> Round:
    """The same work by transformers."""
    from transformers import DynamicCache

    model = make_llama(shape, DTYPES[dtype]).eval()
    prompt = prompts(SHAPES[shape].vocab_size, batch, PROMPT)

    @torch.inference_mode()
    def run() -> float:
        cache = DynamicCache(config=model.config)
        tokens, chosen, start = prompt, [], 0.0
        for step in range(new):
            if step == 1:
                start = time.perf_counter()
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            chosen.append(tokens.tolist())
        return time.perf_counter() - start

    return run


def reading_round(shape: str, dtype: str, new: int) -> Round:
    """Reading a buffer as large as the weights of the stitched model's token, as often as tokens are timed."""
    buffer = torch.ones(token_bytes(shape, dtype) // 4, dtype=torch.float32)

    def run() -> None:
        for _ in range(new - 1):
            buffer.sum().item()

    return run


def token_bytes(shape: str, dtype: str) -> int:
    """Weights that one token of the stitched model reads, bytes."""
    return weight_bytes(make_bts(shape, TorchBackend(DTYPES[dtype], "meta", ParallelMesh().tp)))


def weight_bytes(model: nn.Module) -> int:
    """Weights that one token reads, bytes: all but the embeddings."""
    read = [p for name, p in model.named_parameters() if not name.endswith("embedding.weight")]
    return sum(p.numel() * p.element_size() for p in read)


def prompts(vocab_size: int, batch: int, length: int) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


BENCHMARKS = tuple(
    Benchmark(
        f"decode-{shape}-{dtype}-{batch}", partial(decode, shape=shape, dtype=dtype, batch=batch), ("transformers",)
    )
    for shape in SHAPES
    for dtype in DTYPES
    for batch in BATCHES
)
