"""Which rank holds which members, and how many bytes a stitch moves: counted from the calls, and by the kernel."""

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megabts.bts.flow import StitchFlow
from megabts.bts.placement import Exchanges, Placement, local_members
from megabts.bts.plan import Kind, StitchPoint
from megabts.bts.stitch import Stitch
from megabts.model.torch_backend import TorchBackend
from megabts.parallel import collectives
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import named_metas
from tests.bts.reference import config_of
from tests.ranks import run_ranks

EIH: Kind = "experts_into_hub"
HIE: Kind = "hub_into_experts"
S, B, D = 256, 4, 64
STATE = S * B * D * 4
SIZES = (2, 4, 8)
STITCHES: dict[str, tuple[Kind, str]] = {
    "into experts": (HIE, "gather"),
    "gather": (EIH, "gather"),
    "reduce": (EIH, "reduce"),
}


@pytest.mark.parametrize(
    "members, ranks, counts",
    [(4, 1, [4]), (4, 3, [1, 1, 2]), (5, 2, [2, 3]), (5, 3, [1, 2, 2]), (4, 4, [1, 1, 1, 1]), (8, 3, [2, 3, 3])],
)
def test_who_is_where(members: int, ranks: int, counts: list[int]) -> None:
    shares = [local_members(members, Axis("ep", ranks, rank)) for rank in range(ranks)]
    assert [number for share in shares for number in share] == list(range(members))
    assert [len(share) for share in shares] == counts
    names = ("hub", *(f"e{i}" for i in range(1, members)))
    placements = [Placement.of(names, Axis("ep", ranks, rank)) for rank in range(ranks)]
    assert tuple(name for placement in placements for name in placement.local) == names
    assert [placement.has_hub for placement in placements] == [True] + [False] * (ranks - 1)
    assert all(placement.counts == counts for placement in placements)
    assert tuple(name for placement in placements for name in placement.experts) == names[1:]
    assert [len(placement.experts) for placement in placements] == placements[0].expert_counts


@pytest.mark.parametrize(
    "experts, ranks, asked, found",
    [(3, 2, "auto", "gather"), (4, 2, "auto", "reduce"), (9, 1, "reduce", "gather"), (1, 2, "reduce", "reduce")],
)
def test_choice_of_the_exchange(experts: int, ranks: int, asked: Any, found: str) -> None:
    members = ["hub", *(f"e{i}" for i in range(experts))]
    assert Placement.of(members, Axis("ep", ranks, 0), asked).exchange == found


@dataclass
class Traffic:
    """Calls of one stitch, forward and backward, on one rank."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    """Collectives, each with the elements it is about; every rank must make the same."""
    counted: float = 0.0
    """Bytes sent and received, in states, by what each call's algorithm costs."""
    measured: float | None = None
    """The same by the kernel's account of this process's TCP connections; None where it keeps none."""


def tcp_bytes() -> int | None:
    """Bytes that the process's TCP connections have sent and received (struct tcp_info of linux/tcp.h)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            kind = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # closed by now
            continue
        if not kind.startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) < 216:
                return None
            received, (sent, again) = struct.unpack_from("Q", info, 128)[0], struct.unpack_from("QQ", info, 200)
            total += received + sent - again
    return total


@contextmanager
def counting(traffic: Traffic, ep: Axis) -> Iterator[None]:
    """Count the calls of torch.distributed inside the block, at what their algorithms on gloo cost."""
    share, hub = (ep.size - 1) / ep.size, ep.rank == 0

    def states(x: torch.Tensor) -> float:
        return x.numel() * x.element_size() / STATE

    costs: dict[str, Callable[..., float]] = {
        "scatter": lambda mine, *_: states(mine) * (ep.size - 1 if hub else 1),
        "all_gather_single": lambda out, mine: 2 * states(mine) * (ep.size - 1),
        "reduce": lambda x: states(x) * (3 * share if hub else 1 + share),
        "all_reduce": lambda x: states(x) * 4 * share,
        "batch_isend_irecv": lambda operations: sum(states(each.tensor) for each in operations),
    }
    homes = {name: collectives if name == "all_gather_single" else dist for name in costs}
    kept = {name: getattr(home, name) for name, home in homes.items()}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            traffic.counted += costs[name](*args)
            if name != "batch_isend_irecv":
                traffic.calls.append((name, args[0].numel()))
            return kept[name](*args, **settings)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, home in homes.items():
            patch.setattr(home, name, counted(name))
        yield


def traffic_of(ep: Axis, kind: Kind, exchange: Any) -> Traffic:
    """One stitch with a member a rank, in training, every state needing a gradient."""
    bts = config_of(ep.size - 1)
    needs = frozenset(bts.members)
    flow = StitchFlow(StitchPoint(1, kind), trained=needs, before=needs, after=needs)
    placement = Placement.of(bts.members, ep, exchange)
    stitch = Stitch(kind, D, bts, TorchBackend(torch.float32, "cpu", Axis("tp")), placement, flow)
    for parameter, meta in ((p, m) for _, p, m in named_metas(stitch)):
        parameter.data.copy_(meta.initial("", 0))
    state = torch.randn(S, B, D, generator=torch.Generator().manual_seed(ep.rank)).requires_grad_()
    traffic, exchanges = Traffic(), Exchanges(ep)
    dist.barrier(ep.group)
    time.sleep(0.1)  # for what the kernel still has to deliver
    before = tcp_bytes()
    with counting(traffic, ep):
        states, _ = stitch([state], exchanges=exchanges, with_gates=False)
        exchanges.leave(torch.stack(states)).sum().backward()
    time.sleep(0.1)
    after = tcp_bytes()
    if before is not None and after is not None:
        traffic.measured = (after - before) / STATE
    assert state.grad is not None
    return traffic


def all_traffic(rank: int) -> dict[int, dict[str, Traffic]]:
    """By number of ranks; a rank is in the groups that are large enough for it."""
    found = {}
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        if rank < size:
            ep = Axis("ep", size, rank, group, tuple(range(size)))
            found[size] = {name: traffic_of(ep, *stitch) for name, stitch in STITCHES.items()}
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def traffic() -> dict[int, dict[str, list[Traffic]]]:
    """By number of ranks and stitch: of every rank."""
    ranks = run_ranks(max(SIZES), all_traffic)
    return {size: {name: [rank[size][name] for rank in ranks[:size]] for name in STITCHES} for size in SIZES}


def stated(name: str, size: int) -> list[float]:
    """What the head of `placement` says, in states, by rank."""
    f = (size - 1) / size
    n = size - 1
    hub, other = {"into experts": (6 * f, 2 * f + 2), "gather": (2 * n, 2), "reduce": (22 * f, 10 * f + 6)}[name]
    return [hub] + [other] * (size - 1)


@pytest.mark.parametrize("name", STITCHES)
def test_bytes_of_a_stitch_as_stated(traffic: dict[int, dict[str, list[Traffic]]], name: str) -> None:
    for size in SIZES:
        ranks = traffic[size][name]
        assert [rank.counted for rank in ranks] == pytest.approx(stated(name, size))
        assert all(rank.calls == ranks[0].calls for rank in ranks), "every rank takes part in every collective in order"


def test_bytes_do_not_grow_with_the_experts(traffic: dict[int, dict[str, list[Traffic]]]) -> None:
    """The bounds are what f = 1 gives; n experts gathered are 2 n states at the hub."""
    for name, bound in (("into experts", 6), ("reduce", 22)):
        largest = [max(rank.counted for rank in traffic[size][name]) for size in SIZES]
        assert all(states < bound for states in largest), name
    assert [max(rank.counted for rank in traffic[size]["gather"]) for size in SIZES] == [2, 6, 14]


@pytest.mark.parametrize("name", STITCHES)
def test_the_kernel_counts_the_same(traffic: dict[int, dict[str, list[Traffic]]], name: str) -> None:
    for size in SIZES:
        for rank, each in enumerate(traffic[size][name]):
            if each.measured is None:
                pytest.skip("this kernel does not count the bytes of TCP connections")
            assert each.measured == pytest.approx(each.counted, rel=0.02, abs=0.02), (size, rank)
