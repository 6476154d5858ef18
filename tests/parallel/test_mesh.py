"""The rank grid: its order, its arithmetic, its groups on real ranks, and collectives with their duals."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megabts.config.run import ParallelConfig
from megabts.errors import UsageError
from megabts.parallel.collectives import (
    all_gather,
    all_reduce,
    broadcast_object,
    copy,
    exchange,
    gather,
    gather_sum,
    reduce,
    reduce_scatter,
    send_rows,
    split,
)
from megabts.parallel.mesh import AXES, Axis, ParallelMesh, build_mesh, degrees
from megabts.runtime.device import collective_timeout
from tests.ranks import run_ranks


def test_one_rank_has_four_axes_of_one() -> None:
    mesh = build_mesh(ParallelConfig(), 1, 0)
    assert mesh == ParallelMesh()
    assert (mesh.world_size, mesh.rank) == (1, 0)


def test_dp_takes_what_the_others_leave() -> None:
    assert degrees(ParallelConfig(tensor=2, pipeline=3, expert=4), 48) == (3, 2, 4, 2)


@pytest.mark.parametrize("world_size", [1, 6, 20])
def test_degrees_that_do_not_fit_are_refused_with_the_arithmetic(world_size: int) -> None:
    message = (
        rf"parallel.pipeline 2 x .*expert 2 x .*tensor 2 = 8 does not divide the {world_size} ranks.* multiple of 8"
    )
    with pytest.raises(UsageError, match=message):
        degrees(ParallelConfig(tensor=2, pipeline=2, expert=2), world_size)


def test_rank_number_has_tp_fastest() -> None:
    sizes = (2, 3, 2, 2)
    for number, place in enumerate(product(*map(range, sizes))):
        axes = {name: Axis(name, size, at) for name, size, at in zip(AXES, sizes, place)}
        assert ParallelMesh(**axes).rank == number


GRIDS: list[dict[str, Any]] = [
    {"tensor": 2},
    {"tensor": 2, "expert": 2},
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2},
    {"expert": 4},
    {"expert": 2},
]


def show_groups(rank: int) -> list[dict[str, Any]]:
    """For each grid: the global ranks of this rank's groups by axis, its place there, and its number."""
    found = []
    for grid in GRIDS:
        mesh = build_mesh(ParallelConfig(**grid, timeout=7), 4, rank)
        shown: dict[str, Any] = {"rank": mesh.rank, "world": mesh.world_size}
        routed = mesh.routed
        shown["routed"] = (routed.rank, routed.world_size, routed.pp, routed.tp) == (mesh.rank, 4, mesh.pp, mesh.tp)
        parts = {"data": routed.dp, "experts": routed.experts, "replicas": routed.replicas, "members": routed.ep}
        for name, axis in [*((name, mesh.axis(name)) for name in AXES), *parts.items()]:
            members = [rank] if axis.group is None else dist.get_process_group_ranks(axis.group)
            if axis.group is not None:  # a group does not inherit the time-out
                assert axis.group._get_backend(torch.device("cpu")).options._timeout == collective_timeout(7)
            total = all_reduce(torch.tensor([10.0**rank]), axis)
            shown[name] = (members, members[axis.rank], axis.size, int(total))
        found.append(shown)
    return found


def test_groups_of_four_real_ranks() -> None:
    expected = {  # the ranks of each line, by grid and axis
        0: {"tp": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]]},
        1: {"tp": [[0, 1], [2, 3]], "ep": [[0, 2], [1, 3]]},
        2: {"tp": [[0, 1], [2, 3]], "pp": [[0, 2], [1, 3]]},
        3: {"dp": [[0, 1], [2, 3]], "pp": [[0, 2], [1, 3]]},
        4: {"ep": [[0, 1, 2, 3]]},
        5: {"ep": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]], "data": [[0, 1, 2, 3]]},
    }
    for lines in expected.values():
        lines |= {"experts": lines.get("ep", []), "replicas": lines.get("dp", [])}
        lines.setdefault("data", lines.get("ep") or lines.get("dp") or [])
    for rank, grids in enumerate(run_ranks(4, show_groups)):
        for number, shown in enumerate(grids):
            assert (shown["rank"], shown["world"], shown["routed"]) == (rank, 4, True)
            for name in (*AXES, "data", "experts", "replicas", "members"):
                line = next((x for x in expected[number].get(name, []) if rank in x), [rank])
                assert shown[name] == (line, rank, len(line), sum(10**r for r in line)), (GRIDS[number], name)


def use_collectives(rank: int) -> dict[str, Tensor]:
    axis = build_mesh(ParallelConfig(tensor=3), 3, rank).tp
    x = torch.full((2,), float(rank + 1), requires_grad=True)
    weight = rank + 1.0
    copied, reduced = copy(x, axis), reduce(x, axis)
    (copied_grad,) = torch.autograd.grad((copied * weight).sum(), x)
    (reduced_grad,) = torch.autograd.grad((reduced * weight).sum(), x)
    sizes = [2, 1, 3]
    part = torch.full((2, sizes[rank]), float(rank))
    largest = all_reduce(torch.tensor([float(rank)]), axis, dist.ReduceOp.MAX)
    numbers = [(rank + other) % 3 for other in range(3)]  # rows sent to and received from
    rows = torch.tensor([[10.0 * rank + to] for to in range(3) for _ in range(numbers[to])], requires_grad=True)
    came = send_rows(rows, numbers, numbers, axis)
    (rows_grad,) = torch.autograd.grad(came, rows, came.detach() + 100 * rank)
    return {
        "came": came.detach().flatten(),
        "rows_grad": rows_grad.flatten(),
        "copied": copied.detach(),
        "copied_grad": copied_grad,
        "reduced": reduced.detach(),
        "reduced_grad": reduced_grad,
        "input": x.detach(),
        "gathered": all_gather(part, axis, 1, sizes),
        "largest": largest,
        "object": torch.tensor(broadcast_object([rank + 7])),
    }


def test_collectives_and_their_duals() -> None:
    for rank, found in enumerate(run_ranks(3, use_collectives)):
        pairs = [(rank, other) for other in range(3) for _ in range((rank + other) % 3)]
        assert found["came"].tolist() == [10.0 * other + me for me, other in pairs]
        assert found["rows_grad"].tolist() == [10.0 * me + other + 100 * other for me, other in pairs]
        assert found["input"].tolist() == [rank + 1.0] * 2
        assert found["copied"].tolist() == [rank + 1.0] * 2
        assert found["copied_grad"].tolist() == [6.0, 6.0]
        assert found["reduced"].tolist() == [6.0, 6.0]
        assert found["reduced_grad"].tolist() == [rank + 1.0] * 2
        assert found["gathered"].tolist() == [[0, 0, 1, 2, 2, 2]] * 2
        assert found["largest"].item() == 2
        assert found["object"].tolist() == [7]


def test_one_rank_needs_no_communication() -> None:
    axis, x = Axis("tp"), torch.ones(2)
    assert all(y is x for y in (all_reduce(x, axis), all_gather(x, axis, 0, [2]), copy(x, axis), reduce(x, axis)))
    assert broadcast_object("x") == "x"


def slices_work(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(result, gradient) of every pair on 2 ranks; each rank weighs what it got by its own numbers."""
    axis = build_mesh(ParallelConfig(tensor=2), 2, rank).tp
    found = {}
    for name, (function, dims) in SLICED.items():
        x = numbers(rank, (4, 3, 6)).requires_grad_()
        out = function(x, axis, *dims)
        weights = numbers(10 if name in ALIKE else 10 + rank, tuple(out.shape))
        (out * weights).sum().backward()
        assert x.grad is not None
        found[name] = (out.detach(), x.grad)
    return found


SLICED: dict[str, Any] = {
    "gather_sum": (gather_sum, (0,)),
    "gather_sum-last": (gather_sum, (-1,)),
    "reduce_scatter": (reduce_scatter, (0,)),
    "gather": (gather, (-1,)),
    "exchange": (exchange, (-1, 0)),
    "exchange-back": (exchange, (0, -1)),
}
ALIKE = {"gather"}


def numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sliced_reference(name: str) -> list[tuple[Tensor, Tensor]]:
    """The same on one rank: both inputs, both outputs, and the sum of what both ranks make of them."""
    inputs = [numbers(rank, (4, 3, 6)).requires_grad_() for rank in range(2)]
    dims = SLICED[name][1]
    if name.startswith("gather"):
        outputs = [torch.cat(inputs, dims[0])] * (1 if name in ALIKE else 2)
    elif name.startswith("reduce"):
        outputs = list((inputs[0] + inputs[1]).chunk(2, dims[0]))
    else:
        parts = [x.chunk(2, dims[0]) for x in inputs]
        outputs = [torch.cat([mine[rank] for mine in parts], dims[1]) for rank in range(2)]
    weights = [numbers(10 + rank, tuple(out.shape)) for rank, out in enumerate(outputs)]
    grads = torch.autograd.grad([(out * w).sum() for out, w in zip(outputs, weights, strict=True)], inputs)
    if len(outputs) == 1:
        outputs = outputs * 2
    return [(out.detach(), grad) for out, grad in zip(outputs, grads, strict=True)]


def test_slices_and_their_duals_equal_one_rank() -> None:
    ranks = run_ranks(2, slices_work)
    for name in SLICED:
        for rank, (out, grad) in enumerate(sliced_reference(name)):
            torch.testing.assert_close(ranks[rank][name][0], out, msg=name)
            torch.testing.assert_close(ranks[rank][name][1], grad, msg=name)


def split_work(rank: int) -> tuple[Tensor, Tensor]:
    axis = build_mesh(ParallelConfig(tensor=2), 2, rank).tp
    x = numbers(3, (4, 3, 6)).requires_grad_()  # the same on both
    (split(x, axis, -1) * numbers(rank, (4, 3, 3))).sum().backward()
    assert x.grad is not None
    return split(x, axis, -1).detach(), x.grad


def test_split_gives_every_rank_the_whole_gradient() -> None:
    whole = torch.cat([numbers(rank, (4, 3, 3)) for rank in range(2)], -1)
    for rank, (part, grad) in enumerate(run_ranks(2, split_work)):
        assert part.equal(numbers(3, (4, 3, 6)).chunk(2, -1)[rank])
        assert grad.equal(whole)
