"""Ours and transformers' models of one shape are the same size, and compute the same from the same weights."""

from typing import Any

import pytest
import torch

from megabts.benchmark.shapes import DTYPES, NUM_EXPERTS, SHAPES, make_bts, make_dense, make_llama
from megabts.model.decoder import sequence_loss
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh


def backend(dtype: torch.dtype, device: str = "cpu") -> TorchBackend:
    return TorchBackend(dtype, device, ParallelMesh().tp)


@pytest.mark.parametrize("shape", SHAPES)
def test_same_number_of_parameters(shape: str) -> None:
    with torch.device("meta"):
        theirs = make_llama(shape, torch.bfloat16)
    ours = make_dense(shape, backend(torch.bfloat16, "meta"))
    count = sum(p.numel() for p in ours.parameters())
    assert count == theirs.num_parameters()
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    bts = make_bts(shape, backend(torch.bfloat16, "meta"))
    assert bts.num_members == 4 == NUM_EXPERTS + 1
    assert [point.after for point in bts.plan] == list(range(2, SHAPES[shape].num_layers + 1, 2))


@pytest.mark.parametrize("name", DTYPES)
def test_values_are_random_alike(name: str) -> None:
    """A loss near ln V says that nothing is zero, infinite or of another scale."""
    ours, theirs = make_dense("S", backend(DTYPES[name])), make_llama("S", DTYPES[name])
    tokens = torch.randint(8192, (1, 33), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = sequence_loss(ours, tokens[:, :-1], tokens[:, 1:], torch.ones(1, 32)) / 32
        reference: Any = theirs(tokens, labels=tokens)
    assert float(loss) == pytest.approx(float(reference.loss), abs=0.1)
    assert float(loss) == pytest.approx(9.01, abs=0.2)
