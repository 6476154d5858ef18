"""Which rows a rank holds, and starts that do not depend on the topology."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megabts.errors import UsageError, UserError
from megabts.parallel.mesh import Axis, ParallelMesh
from megabts.parallel.sharding import ParamMeta, initialise, load_full, name_seed, named_metas
from megabts.parallel.tensor import ColumnLinear, VocabMeta, vocab_range
from tests.model.models import decoder

CPU = torch.device("cpu")


def axis(size: int, rank: int) -> Axis:
    return Axis("tp", size, rank)


def rows(meta: ParamMeta, size: int) -> list[list[int]]:
    """The rows (of the split dimension) of each rank, by sharding their numbers."""
    assert meta.dim is not None
    numbers = torch.arange(meta.shape[meta.dim]).float()
    full = numbers.view([-1 if dim == meta.dim else 1 for dim in range(len(meta.shape))]).expand(meta.shape)
    held = []
    for rank in range(size):
        part = meta.shard(full, axis(size, rank))
        assert tuple(part.shape) == meta.local_shape(axis(size, rank))
        held.append(part.movedim(meta.dim, 0).reshape(part.shape[meta.dim], -1)[:, 0].int().tolist())
    return held


def test_one_part_is_split_evenly() -> None:
    assert rows(ParamMeta((6, 2), dim=0), 3) == [[0, 1], [2, 3], [4, 5]]
    assert rows(ParamMeta((2, 4), dim=1), 2) == [[0, 1], [2, 3]]


def test_a_fused_matrix_is_split_part_by_part() -> None:
    gate_up = ParamMeta((8, 2), dim=0, parts=(4, 4))
    assert rows(gate_up, 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    qkv = ParamMeta((16, 2), dim=0, parts=(4, 2, 2), unit=2)
    assert rows(qkv, 2) == [[0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15]]


def test_a_part_with_fewer_units_than_ranks_is_held_by_several() -> None:
    grouped = ParamMeta((8,), dim=0, parts=(4, 2, 2))
    assert rows(grouped, 4) == [[0, 4, 6], [1, 4, 6], [2, 5, 7], [3, 5, 7]]
    multi_query = ParamMeta((6,), dim=0, parts=(4, 1, 1))
    assert rows(multi_query, 2) == [[0, 1, 4, 5], [2, 3, 4, 5]]


def test_every_row_is_somewhere_and_a_query_head_once() -> None:
    for size in (1, 3, 6, 12):
        held = rows(ParamMeta((36,), dim=0, parts=(12, 3, 3), unit=2), size)
        assert {row for rank in held for row in rank} == set(range(36))
        assert sorted(row for rank in held for row in rank if row < 24) == list(range(24))


def test_a_part_that_divides_neither_way_is_refused() -> None:
    with pytest.raises(UsageError, match="tp degree 4 neither divides nor is a multiple of 6"):
        ParamMeta((6, 2), dim=0).slices(axis(4, 0))


@pytest.mark.parametrize("vocab_size, size", [(97, 1), (97, 2), (97, 3), (97, 8), (4, 4)])
def test_vocabulary_is_in_blocks_and_need_not_divide(vocab_size: int, size: int) -> None:
    held = rows(VocabMeta((vocab_size, 2), dim=0), size)
    assert [row for rank in held for row in rank] == list(range(vocab_size))
    block = -(-vocab_size // size)
    assert [len(rank) for rank in held[:-1]] == [block] * (size - 1)
    assert [vocab_range(vocab_size, axis(size, r)) for r in range(size)] == [(r[0], r[-1] + 1) for r in held]


def test_names_and_seed_decide_the_numbers() -> None:
    meta = ParamMeta((50, 40), "normal", 0.5)
    start = meta.initial("layers.0.mlp.down.weight", 3)
    assert torch.equal(start, meta.initial("layers.0.mlp.down.weight", 3))
    for other in (meta.initial("layers.1.mlp.down.weight", 3), meta.initial("layers.0.mlp.down.weight", 4)):
        assert abs(torch.corrcoef(torch.stack([start.flatten(), other.flatten()]))[0, 1]) < 0.1
    assert abs(start.std() / 0.5 - 1) < 0.05
    assert abs(start.mean()) < 0.05
    # Checkpointed runs and comparisons between versions rest on these numbers.
    assert name_seed("layers.0.mlp.down.weight", 0) == 935827187761220205
    assert len({name_seed(f"layers.{i}.x", seed) for i in range(50) for seed in range(20)}) == 1000


def test_constant_and_identity_starts() -> None:
    assert ParamMeta((3,), "constant", 1.0).initial("x", 0).tolist() == [1, 1, 1]
    assert torch.equal(ParamMeta((3, 3), "identity").initial("x", 0), torch.eye(3))


@pytest.mark.parametrize("size", [2, 4])
def test_a_start_is_the_same_whatever_the_degree(size: int) -> None:
    """Every rank's parameters are the slices of the one-rank model's: fused, replicated and vocabulary rows too."""
    whole = {name: p.detach() for name, p, _ in decoder(qkv_bias=True, qk_norm=True).own_parameters()}
    for rank in range(size):
        mesh = ParallelMesh(tp=axis(size, rank))
        for name, parameter, meta in decoder(mesh, qkv_bias=True, qk_norm=True).own_parameters():
            assert torch.equal(parameter, meta.shard(whole[name], mesh.tp)), name


def test_a_start_does_not_depend_on_what_else_there_is() -> None:
    short, long = decoder(num_layers=1, init_std=0.1), decoder(init_std=0.1)
    named = dict(long.named_parameters())
    same = [n for n, p in short.named_parameters() if torch.equal(p, named[n])]
    assert "layers.0.attention.qkv.weight" in same
    assert "head.weight" in same


def test_tied_parameters_are_named_once() -> None:
    names = [name for name, _, _ in named_metas(decoder(tie_embeddings=True))]
    assert "embedding.weight" in names
    assert "head.weight" not in names
    assert len(names) == len(set(names))


def column(mesh: ParallelMesh) -> ColumnLinear:
    return ColumnLinear(ParamMeta((4, 3), "normal", 1.0, dim=0), None, mesh.tp, torch.float32, CPU)


def test_load_full_keeps_a_slice_and_refuses_what_does_not_fit() -> None:
    mesh = ParallelMesh(tp=axis(2, 1))
    module, full = column(mesh), torch.arange(12.0).view(4, 3)
    load_full(named_metas(module), [("weight", full)], mesh, "here")
    assert torch.equal(module.weight, full[2:])
    cases = {
        r"here: weight has shape \(3, 4\), the model \(4, 3\)": [("weight", full.T)],
        "it has bias, which the model lacks": [("bias", full)],
        "it has weight, which the model lacks or has had already": [("weight", full), ("weight", full)],
        "it lacks weight": [],
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message):
            load_full(named_metas(module), tensors, mesh, "here")


def test_initialise_reads_the_axis_of_the_parameter() -> None:
    mesh = ParallelMesh(ep=Axis("ep", 2, 1))
    module = column(ParallelMesh())
    module.metas["weight"] = meta = replace(module.metas["weight"], axis="ep")
    module.weight = nn.Parameter(torch.empty(2, 3))
    initialise(named_metas(module), 0, mesh)
    assert torch.equal(module.weight, meta.initial("weight", 0)[2:])


def test_shared_rows_are_those_that_several_ranks_hold() -> None:
    for meta in (ParamMeta((16, 2), dim=0, parts=(4, 2, 2), unit=2), ParamMeta((12,), dim=0, parts=(8, 1, 1, 2))):
        for size in (1, 2, 4):
            held = rows(meta, size)
            for rank, mine in enumerate(held):
                others = {row for other in held[:rank] + held[rank + 1 :] for row in other}
                lower = {row for other in held[:rank] for row in other}
                for ranges, expected in ((meta.replicated, others), (meta.duplicates, lower)):
                    found = [row for a, b in ranges(axis(size, rank)) for row in mine[a:b]]
                    assert found == [row for row in mine if row in expected]


def test_a_parameter_that_is_not_split_is_shared_whole() -> None:
    meta = ParamMeta((6, 3))
    assert meta.replicated(axis(1, 0)) == meta.duplicates(axis(1, 0)) == meta.duplicates(axis(2, 0)) == []
    assert meta.replicated(axis(2, 0)) == meta.duplicates(axis(2, 1)) == [(0, 6)]
