"""Whole decoders split over tensor-parallel ranks against one rank: logits, loss and gradients.

On each rank the gradients of sharded and of replicated parameters are complete, except where the ranks see different
heads of one parameter: query and key norms, and the rows of key/value heads that several ranks hold. Those are partial:
their sum over tp is the gradient.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.config.run import ParallelConfig
from megabts.errors import UsageError
from megabts.model.attention import make_context
from megabts.model.decoder import Decoder
from megabts.parallel.mesh import Axis, ParallelMesh, build_mesh
from megabts.parallel.sharding import ParamMeta
from megabts.parallel.tensor import RowLinear, Vocabulary
from tests.model.models import VARIANTS, batch, decoder, distance, gradients
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {name: VARIANTS[name] for name in ("gqa", "mha", "mqa", "tied", "bias", "qk-norm")},
    4: {"one-kv-head": {"num_kv_heads": 1}, "gqa": {"qkv_bias": True}, "eight": {"num_heads": 8, "num_kv_heads": 4}},
}


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    context = make_context(model.config, torch.arange(tokens.shape[1]), torch.float32)
    with torch.no_grad():
        return model.logits(model.run_layers(0, model.config.num_layers, model.embed(tokens), context))


def split_decoders(rank: int, size: int) -> dict[str, tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """(logits, loss, this rank's gradients) of every case; recomputation, too, must issue the same collectives."""
    mesh = build_mesh(ParallelConfig(tensor=size), size, rank)
    found = {}
    for name, sizes in CASES[size].items():
        model = decoder(mesh, recompute="full" if name == "gqa" else "none", **sizes)
        found[name] = (logits_of(model, batch()[0]), *gradients(model, *batch()))
    return found


def is_partial(name: str, tp: int, sizes: dict[str, Any]) -> bool:
    """Whether the ranks' gradients of a parameter add up to its gradient, instead of each being complete."""
    return "q_norm" in name or "k_norm" in name or ("qkv" in name and sizes.get("num_kv_heads", 2) < tp)


def whole_gradient(meta: ParamMeta, parts: list[Tensor], add: bool) -> Tensor:
    """The full tensor's gradient from the ranks' slices: summed where several ranks hold a row and `add`."""
    if meta.dim is None:
        if not add:
            assert all(distance(part, parts[0]) < 2e-6 for part in parts)
        return torch.stack(parts).sum(0) if add else parts[0]
    total = torch.zeros(meta.shape)
    for rank, part in enumerate(parts):
        ranges = meta.slices(Axis("tp", len(parts), rank))
        for (first, last), piece in zip(ranges, part.split([b - a for a, b in ranges], meta.dim)):
            total.narrow(meta.dim, first, last - first).add_(piece)
    return total


@pytest.mark.parametrize("size", CASES)
def test_split_decoders_equal_one_rank(size: int) -> None:
    ranks = run_ranks(size, split_decoders, size)
    for case, sizes in CASES[size].items():
        model = decoder(**sizes)
        logits, (loss, grads) = logits_of(model, batch()[0]), gradients(model, *batch())
        for rank in ranks:
            assert rank[case][0].shape == logits.shape
            assert distance(rank[case][0], logits) < 5e-6, case
            torch.testing.assert_close(rank[case][1], loss)
        for name, _, meta in model.own_parameters():
            parts = [rank[case][2][name] for rank in ranks]
            found = whole_gradient(meta, parts, is_partial(name, size, sizes))
            assert distance(found, grads[name]) < 1e-5, (case, name)


def test_more_ranks_than_query_heads_are_refused() -> None:
    """Two ranks holding one head would add its output twice."""
    with pytest.raises(UsageError, match=r"parallel\.tensor 4 is more than the 2 heads"):
        decoder(ParallelMesh(tp=Axis("tp", 4)), num_heads=2, num_kv_heads=1)
    with pytest.raises(UsageError, match=r"parallel\.tensor 4 is more than the 2 heads or columns"):
        RowLinear(ParamMeta((8, 2), dim=1), Axis("tp", 4), torch.float32, CPU)


def test_a_degree_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="degree 3 neither divides nor is a multiple of 4"):
        decoder(ParallelMesh(tp=Axis("tp", 3)))


def test_a_rank_without_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"parallel\.tensor 4 is too much for a vocabulary of 5"):
        Vocabulary(5, 2, 1.0, Axis("tp", 4), torch.float32, CPU)


def test_parameters_are_split_evenly() -> None:
    whole = sum(p.numel() for p in decoder(vocab_size=96).parameters())
    half = decoder(ParallelMesh(tp=Axis("tp", 2)), vocab_size=96)
    norms = sum(p.numel() for n, p in half.named_parameters() if "norm" in n)
    assert 2 * (sum(p.numel() for p in half.parameters()) - norms) == whole - norms
