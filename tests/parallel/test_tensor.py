"""Whole decoders split over tensor-parallel ranks against one rank: logits, loss and every gradient.

Each with hidden states whole on every rank and split along the sequence. What a parameter's record says of its gradient
(`summed`, rows that several ranks hold) is what makes the whole gradient of the ranks' here.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.config.run import ParallelConfig
from megabts.errors import UsageError
from megabts.model.attention import make_context
from megabts.model.backend import Recompute
from megabts.model.decoder import Decoder
from megabts.parallel.collectives import all_gather, enter
from megabts.parallel.mesh import Axis, ParallelMesh, build_mesh
from megabts.parallel.sharding import ParamMeta
from megabts.parallel.tensor import ColumnLinear, RowLinear, Vocabulary
from tests.model.models import VARIANTS, batch, decoder, distance, gradients
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {name: VARIANTS[name] for name in ("gqa", "mha", "mqa", "tied", "bias", "qk-norm", "post-norm")},
    4: {
        "one-kv-head": {"num_kv_heads": 1, "qk_norm": True},
        "post-norm": {**VARIANTS["post-norm"], "num_kv_heads": 2},
        "gqa": {"qkv_bias": True, "tie_embeddings": True},
        "eight": {"num_heads": 8, "num_kv_heads": 4},
    },
}
RECOMPUTED: tuple[Recompute, ...] = ("selective", "full")


@dataclass
class Ran:
    """What one rank found of a case."""

    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]
    recomputed: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)
    """Loss and gradients again, under every kind of recomputation."""


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    context = make_context(model.config, torch.arange(tokens.shape[1]), torch.float32)
    with torch.no_grad():
        hidden = model.embed(tokens)
        assert tuple(hidden.shape) == model.wire_shape(0, tokens.shape[1], len(tokens))
        hidden = model.run_layers(0, model.config.num_layers, hidden, context)
        assert tuple(hidden.shape) == model.wire_shape(model.config.num_layers, tokens.shape[1], len(tokens))
        return model.logits(hidden)


def split_decoders(rank: int, size: int) -> dict[tuple[str, bool], Ran]:
    """Every case, whole and split along the sequence; recomputation, too, must issue the same collectives."""
    mesh = build_mesh(ParallelConfig(tensor=size), size, rank)
    found = {}
    for name, sizes in CASES[size].items():
        for sequence in (False, True):
            model = decoder(mesh, sequence=sequence, **sizes)
            assert model.wire_shape(1, 24, 2) == (24 // size if sequence else 24, 2, 32)
            ran = Ran(logits_of(model, batch()[0]), *gradients(model, *batch()))
            if name in ("gqa", "qk-norm", "post-norm"):
                again = [decoder(mesh, sequence=sequence, recompute=mode, **sizes) for mode in RECOMPUTED]
                ran.recomputed = [gradients(model, *batch()) for model in again]
            found[name, sequence] = ran
    return found


def whole_gradient(meta: ParamMeta, parts: list[Tensor]) -> Tensor:
    """The full tensor's gradient from the ranks': rows that several ranks hold are either parts of it or equal."""
    total, first = torch.zeros(meta.shape), parts[0]
    for rank, part in enumerate(parts):
        axis, held = Axis("tp", len(parts), rank), part.clone()
        if meta.dim is None and not meta.summed:
            assert distance(part, first) < 2e-6
            for begin, end in meta.duplicates(axis):
                held[begin:end] = 0
        dim, ranges = (0, [(0, meta.shape[0])]) if meta.dim is None else (meta.dim, meta.slices(axis))
        for (begin, end), piece in zip(ranges, held.split([b - a for a, b in ranges], dim)):
            total.narrow(dim, begin, end - begin).add_(piece)
    return total


@pytest.mark.parametrize("size", CASES)
def test_split_decoders_equal_one_rank(size: int) -> None:
    ranks = run_ranks(size, split_decoders, size)
    for case, sizes in CASES[size].items():
        one = decoder(**sizes)
        logits, (loss, grads) = logits_of(one, batch()[0]), gradients(one, *batch())
        for sequence in (False, True):
            found = [rank[case, sequence] for rank in ranks]
            metas = {name: meta for name, _, meta in decoder(sequence=sequence, **sizes).own_parameters()}
            for ran in found:
                assert ran.logits.shape == logits.shape
                assert distance(ran.logits, logits) < 5e-6, (case, sequence)
                torch.testing.assert_close(ran.loss, loss)
                for again_loss, again in ran.recomputed:
                    assert torch.equal(again_loss, ran.loss)
                    assert all(torch.equal(again[name], grad) for name, grad in ran.grads.items()), (case, sequence)
            assert found[0].grads.keys() == grads.keys() == metas.keys()
            for name, meta in metas.items():
                whole = whole_gradient(meta, [ran.grads[name] for ran in found])
                assert distance(whole, grads[name]) < 1e-5, (case, sequence, name)


def kept_shapes(linear: ColumnLinear, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps for the backward of `linear`."""
    kept: list[tuple[int, ...]] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(tuple(saved.shape))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        linear(x)
    return kept


def entered_once(rank: int) -> list[tuple[Tensor, Tensor]]:
    """(input's gradient, output) of two linears of one input: entered by the caller, and each by itself."""
    tp = build_mesh(ParallelConfig(tensor=2), 2, rank).tp
    found = []
    for sequence in (False, True):
        whole = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(3))
        for entered in (False, True):
            hidden = (whole.chunk(2)[rank] if sequence else whole.clone()).requires_grad_()
            out = torch.zeros(())
            x = enter(hidden, tp, sequence) if entered else hidden
            for number in range(2):
                meta = ParamMeta((6, 8), "normal", 1.0, dim=0)
                linear = ColumnLinear(meta, None, tp, torch.float32, CPU, sequence=sequence, entered=entered)
                with torch.no_grad():
                    linear.weight.copy_(meta.shard(meta.initial(str(number), 1), tp))
                out = out + linear(x)
            out.square().sum().backward()
            assert hidden.grad is not None
            grad = all_gather(hidden.grad, tp, 0) if sequence else hidden.grad
            found.append((grad, out.detach()))
            if not entered:  # of a split sequence the slice, and of a frozen linear no input at all
                assert kept_shapes(linear, hidden) == [(2 if sequence else 4, 2, 8), (3, 8)]
                linear.requires_grad_(False)
                assert kept_shapes(linear, hidden) == [(3, 8)]
    with pytest.raises(AssertionError, match="3 do not divide among 2 ranks"):
        Vocabulary(8, 4, 1.0, tp, torch.float32, CPU, sequence=True)(torch.zeros(3, 1, dtype=torch.long))
    return found


def test_a_region_entered_by_the_caller() -> None:
    whole = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weight = sum(ParamMeta((6, 8), "normal", 1.0).initial(str(number), 1) for number in range(2))
    expected = whole @ torch.as_tensor(weight).T
    expected.square().sum().backward()
    assert whole.grad is not None
    for ways in zip(*run_ranks(2, entered_once)):
        assert distance(torch.cat([out for _, out in ways], -1), expected) < 1e-6
        assert all(distance(grad, whole.grad) < 1e-6 for grad, _ in ways)


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
