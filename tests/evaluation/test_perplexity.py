"""Losses per domain against a loop over all windows with torch's own log-softmax, on one rank and on two."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megabts.build import new_model
from megabts.config.model import ModelConfig
from megabts.config.run import ParallelConfig, RunConfig
from megabts.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megabts.data.validation import ValidationSet
from megabts.evaluation.perplexity import DomainLoss, batch_loss, domain_losses
from megabts.evaluation.report import losses_json, losses_table
from megabts.model.attention import make_context
from megabts.model.decoder import Model
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import Axis, ParallelMesh, build_mesh
from tests.ranks import run_ranks

SEQ, EOD = 16, 256
SIZES = ModelConfig(
    vocab_size=257, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=64, init_std=0.3
)
MEAN_BYTES = 3.5


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 40 short documents, whose sidecar claims 3.5 bytes of text a token."""
    rng = np.random.RandomState(0)
    path = tmp_path_factory.mktemp("data") / "text"
    with IndexedDatasetBuilder(path, np.uint16) as builder:
        total = 0
        for _ in range(40):
            document = [*rng.randint(0, 256, rng.randint(1, 20)), EOD]
            builder.add_item(document)
            builder.end_document()
            total += len(document)
        builder.finalize({"tokens": total, "text_bytes": int(MEAN_BYTES * total)})
    return str(path)


def model_of(seed: int = 0) -> Model:
    mesh = ParallelMesh()
    config = RunConfig(model=SIZES)
    config.train.seed = seed
    return new_model(config, mesh, TorchBackend(torch.float32, "cpu", mesh.tp))[0]


def windows(prefix: str, samples: int | None = None) -> ValidationSet:
    source = IndexedDataset(prefix)
    return ValidationSet(source, 0, len(source), SEQ, samples)


@torch.no_grad()
def brute_force(prefix: str, model: Model, *, mask_eod: bool = False) -> tuple[float, int]:
    """Sum of -log p over every token after the first, window by window, read from the raw file."""
    tokens = np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64)
    total, count = 0.0, 0
    for begin in range(0, (len(tokens) - 1) // SEQ * SEQ, SEQ):
        inputs = torch.from_numpy(tokens[begin : begin + SEQ])[None]
        context = make_context(model.config, torch.arange(SEQ), model.dtype)
        logits = model.logits(model.run_layers(0, SIZES.num_layers, model.embed(inputs), context), context)[0]
        scores = torch.log_softmax(logits.double(), -1)
        for position in range(SEQ):
            if not (mask_eod and tokens[begin + position] == EOD):
                total -= scores[position, tokens[begin + position + 1]].item()
                count += 1
    return total, count


def measure(
    prefix: str, dp: Axis, micro_batch: int = 4, samples: int | None = None, mask_eod: bool = False
) -> DomainLoss:
    cpu = torch.device("cpu")
    sets = {"text": windows(prefix, samples)}
    found = domain_losses(
        partial(batch_loss, model_of(), device=cpu),
        sets,
        model=SIZES,
        micro_batch=micro_batch,
        dp=dp,
        device=cpu,
        eod_id=EOD,
        eod_mask_loss=mask_eod,
    )
    return found["text"]


@pytest.mark.parametrize("mask_eod", [False, True])
def test_the_loss_of_all_windows(prefix: str, mask_eod: bool) -> None:
    total, count = brute_force(prefix, model_of(), mask_eod=mask_eod)
    found = measure(prefix, Axis("dp"), mask_eod=mask_eod)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / count / math.log(2) / MEAN_BYTES, rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 7, 1000])
def test_the_batch_size_does_not_matter(prefix: str, micro_batch: int) -> None:
    one, other = measure(prefix, Axis("dp")), measure(prefix, Axis("dp"), micro_batch)
    assert (one.tokens, one.loss) == (other.tokens, pytest.approx(other.loss, rel=1e-6))


def on_ranks(rank: int, prefix: str) -> list[DomainLoss]:
    dp = build_mesh(ParallelConfig(), 2, rank).dp
    return [measure(prefix, dp), measure(prefix, dp, 4, samples=5), measure(prefix, dp, 4, samples=1)]


def test_ranks_share_the_windows(prefix: str) -> None:
    """Also fewer windows than ranks x micro-batch, and a rank that has none at all."""
    expected = [measure(prefix, Axis("dp"), samples=samples) for samples in (None, 5, 1)]
    for found in run_ranks(2, on_ranks, prefix):
        assert [result.tokens for result in found] == [result.tokens for result in expected]
        assert [result.loss for result in found] == pytest.approx([result.loss for result in expected], rel=1e-6)
    assert [result.tokens for result in expected[1:]] == [5 * SEQ, SEQ]


def test_without_tokens_there_is_no_loss(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "eods", np.uint16) as builder:
        builder.add_item([EOD] * (SEQ + 1))
        builder.end_document()
        builder.finalize()
    found = measure(str(tmp_path / "eods"), Axis("dp"), mask_eod=True)
    assert found.tokens == 0
    assert math.isnan(found.loss)


def test_report() -> None:
    results = {"code": DomainLoss(2.0, 1_234, 4.0), "mathematics": DomainLoss(1.0, 10, None)}
    assert losses_json(results)["code"] == {
        "loss": 2.0,
        "perplexity": pytest.approx(7.389, abs=1e-3),
        "bits_per_byte": pytest.approx(0.7213, abs=1e-4),
        "tokens": 1234,
    }
    assert losses_json(results)["mathematics"]["bits_per_byte"] is None
    head, code, mathematics, average = losses_table(results).splitlines()
    assert head.split() == ["domain", "nats/token", "perplexity", "bits/byte", "tokens"]
    assert code.split() == ["code", "2.0000", "7.39", "0.7213", "1,234"]
    assert mathematics.split() == ["mathematics", "1.0000", "2.72", "-", "10"]
    assert average.split() == ["average", "1.5000"]
    assert len({len(line) for line in (head, code, mathematics)}) == 1
