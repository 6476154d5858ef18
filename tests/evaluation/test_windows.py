"""Windows from where documents begin: which tokens they hold, and losses by position against plain formulas."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megabts.config.methods import BTMConfig
from megabts.config.model import ModelConfig
from megabts.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megabts.errors import UserError
from megabts.evaluation.windows import SEGMENT, by_position, document_windows, mixed_windows, position_losses
from megabts.merge.ensemble import Ensemble
from megabts.model.decoder import Decoder, Model
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas

SIZES = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=24, init_std=0.4)
CPU = torch.device("cpu")


def dataset(path: Path, lengths: list[int], first: int) -> IndexedDataset:
    """Documents of these lengths; document d counts up from `first` + d."""
    with IndexedDatasetBuilder(str(path), np.uint16) as builder:
        for number, length in enumerate(lengths):
            builder.add_item([(first + number + i) % 30 + first for i in range(length)])
            builder.end_document()
        builder.finalize()
    return IndexedDataset(str(path))


def start(model: Decoder | Ensemble) -> None:
    initialise(named_metas(model), 5, ParallelMesh())
    model.train(False)


def test_windows_are_beginnings_of_long_enough_documents(tmp_path: Path) -> None:
    found = dataset(tmp_path / "a", [9, 8, 40, 7, 20, 9], 0)
    assert (document_windows(found, 8) == np.stack([found.get(d, 0, 9) for d in (0, 2, 4, 5)])).all()
    assert (document_windows(found, 8, 2) == np.stack([found.get(d, 0, 9) for d in (0, 4)])).all()
    with pytest.raises(UserError, match="no document of more than 40 tokens"):
        document_windows(found, 40)


def test_mixed_windows_change_domain_every_32_to_64_tokens(tmp_path: Path) -> None:
    domains = {"a": dataset(tmp_path / "a", [200, 10, 90], 0), "b": dataset(tmp_path / "b", [70, 66], 32)}
    tokens, owners = mixed_windows(domains, 256, 20, seed=3)
    assert tokens.shape == owners.shape == (20, 257)
    assert ((tokens >= 32) == (owners == 1)).all()
    beginnings = {
        name: {int(d.get(i, 0, 1)[0]) for i in range(len(d)) if d.lengths[i] > 64} for name, d in domains.items()
    }
    for row, owner in zip(tokens, owners, strict=True):
        bounds = [0, *(np.flatnonzero(np.diff(owner)) + 1), 257]
        for begin, end in pairwise(bounds):
            assert row[begin] in beginnings["ab"[owner[begin]]]
            assert end - begin <= SEGMENT[1]
            assert end - begin >= SEGMENT[0] or end == 257
    assert (mixed_windows(domains, 256, 20, seed=3)[0] == tokens).all()
    with pytest.raises(UserError, match="two domains"):
        mixed_windows({"a": domains["a"]}, 256, 1)


def test_a_dense_models_losses_are_its_logits_softmax() -> None:
    model = Decoder(SIZES, TorchBackend(torch.float64, "cpu", ParallelMesh().tp))
    start(model)
    windows = np.random.RandomState(1).randint(64, size=(5, 13))
    expected = torch.stack([next_losses(model, row) for row in windows])
    torch.testing.assert_close(position_losses(model, windows, CPU, micro_batch=2), expected, rtol=1e-6, atol=0)


def test_an_ensembles_posterior_starts_anew_with_each_window() -> None:
    """Against the product of probabilities, window by window."""
    model = Ensemble(
        SIZES, BTMConfig({"a": "", "b": "", "c": ""}), TorchBackend(torch.float64, "cpu", ParallelMesh().tp)
    )
    start(model)
    windows = np.random.RandomState(2).randint(64, size=(3, 11))
    expected = torch.zeros(3, 10, dtype=torch.float64)
    for number, row in enumerate(windows):
        given = torch.stack([(-next_losses(member, row)).exp() for member in model.decoders()])
        joint = torch.ones(3, dtype=torch.float64)
        for t in range(10):
            expected[number, t] = -((joint / joint.sum()) @ given[:, t]).log()
            joint = joint * given[:, t]
    torch.testing.assert_close(position_losses(model, windows, CPU, micro_batch=2), expected, rtol=1e-6, atol=0)


def next_losses(model: Model, row: np.ndarray) -> torch.Tensor:
    """-log p(token t + 1) of one window, every prefix by itself."""
    from megabts.inference.generate import score

    losses = []
    for t in range(1, len(row)):
        with torch.no_grad():
            probabilities = score(model, row[:t].tolist())[-1].softmax(-1)
        losses.append(-probabilities[row[t]].log())
    return torch.stack(losses)


def test_stretches_of_positions_double() -> None:
    losses = torch.arange(20.0, dtype=torch.float64).repeat(3, 1)
    assert by_position(losses) == [(1, 0.0), (2, 1.0), (4, 2.5), (8, 5.5), (16, 11.5), (20, 17.5)]
