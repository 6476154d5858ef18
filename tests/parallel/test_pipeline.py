"""The executor on real ranks against one process: losses and every gradient, bit by bit."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from megabts.parallel.mesh import Axis
from megabts.parallel.pipeline import SENDS_AHEAD, Pipeline, _Live
from megabts.parallel.schedules import ScheduleKind
from tests.ranks import RankError, run_ranks

WIDTH = 5


@dataclass(frozen=True)
class Case:
    """A stack of linears cut into virtual stages; those before `frozen` do not train."""

    schedule: ScheduleKind
    cuts: tuple[int, ...]
    chunks: int
    microbatches: int
    frozen: int = 0
    backward: bool = True


def cases(p: int) -> list[Case]:
    cuts: dict[tuple[int, int], tuple[int, ...]] = {  # uneven, with empty stages first, inside and last
        (2, 1): (1,),
        (3, 1): (1, 1),
        (4, 1): (0, 2, 3),
        (2, 2): (1, 3, 3),
        (3, 2): (0, 1, 2, 2, 4),
        (4, 2): (0, 1, 1, 2, 3, 4, 4),
    }
    found = []
    for frozen in (0, 1, 3, 9):
        found += [Case("none", cuts[p, 1], 1, 3, frozen), Case("1f1b", cuts[p, 1], 1, 6, frozen)]
        found.append(Case("interleaved", cuts[p, 2], 2, 2 * p, frozen))
    found += [Case("1f1b", cuts[p, 1], 1, 1), Case("1f1b", cuts[p, 1], 1, 2 + SENDS_AHEAD, backward=False)]
    return [*found, Case("interleaved", cuts[p, 2], 2, 5, backward=False)]


def layers(frozen: int) -> nn.ModuleList:
    """Four linears, then the loss's one; the first `frozen` do not train."""
    torch.manual_seed(0)
    stack = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
    for layer in stack[:frozen]:
        layer.requires_grad_(False)
    return stack


def batch(microbatch: int) -> Tensor:
    """Its size differs from one micro-batch to the next."""
    return torch.randn(2 + microbatch % 2, WIDTH, generator=torch.Generator().manual_seed(microbatch))


def stage(stack: nn.ModuleList, first: int, last: int, hidden: Tensor) -> Tensor:
    for layer in stack[first:last]:
        hidden = hidden + layer(hidden).tanh()
    return hidden


def alone(case: Case) -> tuple[list[float], list[Tensor | None]]:
    stack, losses = layers(case.frozen), []
    for microbatch in range(case.microbatches):
        loss = stack[4](stage(stack, 0, 4, batch(microbatch))).square().sum()
        losses.append(loss.item())
        if case.backward and loss.requires_grad:
            loss.backward()
    return losses, [parameter.grad for parameter in stack.parameters()]


def piped(rank: int, p: int, case: Case) -> tuple[list[float], list[Tensor | None], list[str]]:
    """This rank's losses, gradients of all layers (None where it does not hold them), and order of backwards."""
    stack, bounds, num_stages = layers(case.frozen), (0, *case.cuts, 4), p * case.chunks
    trains = [any(q.requires_grad for q in stack[: bounds[k + 1]].parameters()) for k in range(num_stages - 1)]
    trains.append(any(q.requires_grad for q in stack.parameters()))
    events: list[str] = []

    def forward(chunk: int, microbatch: int, hidden: Tensor | None) -> Tensor:
        k = chunk * p + rank
        assert (hidden is None) == (k == 0)
        assert torch.is_grad_enabled() == (case.backward and trains[k])
        out = stage(stack, bounds[k], bounds[k + 1], batch(microbatch) if hidden is None else hidden)
        if k == num_stages - 1:
            out = stack[4](out).square().sum()
        if out.requires_grad:
            out.register_hook(lambda _: events.append(f"{chunk}.{microbatch}"))
        return out

    @contextmanager
    def last() -> Iterator[None]:
        events.append("last")
        yield
        events.append("over")

    pipe = Pipeline(Axis("pp", p, rank, None, tuple(range(p))), trains, schedule=case.schedule, chunks=case.chunks)
    losses = pipe.run(
        case.microbatches,
        forward,
        lambda _, microbatch: batch(microbatch).shape,
        backward=case.backward,
        last_backward=last,
    )
    return losses.tolist(), [parameter.grad for parameter in stack.parameters()], events


def work(rank: int, p: int) -> list[Any]:
    return [piped(rank, p, case) for case in cases(p)]


def check(p: int, results: Sequence[Sequence[Any]]) -> None:
    for case, parts in zip(cases(p), zip(*results), strict=True):
        losses, gradients = alone(case)
        assert parts[-1][0] == losses, case
        assert all(not any(part[0]) for part in parts[:-1]), case
        for index, wanted in enumerate(gradients):
            found = [part[1][index] for part in parts if part[1][index] is not None]
            assert len(found) == (wanted is not None), (case, index)
            assert wanted is None or torch.equal(found[0], wanted), (case, index)
        trained = case.backward and case.frozen < 5
        for rank, (_, _, events) in enumerate(parts):
            check_last(case, [chunk for chunk in range(case.chunks) if f"{chunk}.0" in events], events)
            assert bool(events) == trained or rank < p - 1, case


def check_last(case: Case, chunks: list[int], events: list[str]) -> None:
    """Each chunk's last micro-batch, and nothing else, runs between "last" and "over"."""
    inside = [events[at + 1] for at, event in enumerate(events) if event == "last"]
    assert sorted(inside) == [f"{chunk}.{case.microbatches - 1}" for chunk in chunks], case
    assert all(events[at + 2] == "over" for at, event in enumerate(events) if event == "last"), case


def test_one_rank() -> None:
    for schedule in ("none", "1f1b", "interleaved"):
        for frozen in (0, 2, 9):
            case = Case(schedule, (), 1, 3, frozen)  # type: ignore[arg-type]
            check_one(case, piped(0, 1, case))


def check_one(case: Case, found: tuple[list[float], list[Tensor | None], list[str]]) -> None:
    losses, gradients = alone(case)
    assert found[0] == losses
    for mine, wanted in zip(found[1], gradients, strict=True):
        assert (mine is None) == (wanted is None)
        assert mine is None or wanted is None or torch.equal(mine, wanted)
    trained = case.frozen < 5
    assert found[2] == (["0.0", "0.1", "last", "0.2", "over"] if trained else [])


def test_two_ranks() -> None:
    check(2, run_ranks(2, work, 2))


def test_three_ranks() -> None:
    check(3, run_ranks(3, work, 3))


def test_four_ranks() -> None:
    check(4, run_ranks(4, work, 4))


def odd(rank: int, kind: Literal["detached", "empty", "wrong"]) -> tuple[Tensor | None, str]:
    """Three stages of which the middle one does not pass gradient, or gets nothing, or sends something unexpected."""
    weight = torch.ones(2, requires_grad=True)
    width = 0 if kind == "empty" else 2

    def forward(_: int, microbatch: int, hidden: Tensor | None) -> Tensor:
        if rank == 0:
            return (weight * (microbatch + 1))[:width]
        assert hidden is not None
        assert (hidden.shape, hidden.requires_grad) == ((width,), True)
        if rank == 2:
            return (hidden.sum() + weight.sum()) * 3
        return torch.full((width,), 7.0) if kind == "detached" else (hidden * 2)[: 1 if kind == "wrong" else 2]

    pipe = Pipeline(Axis("pp", 3, rank, None, (0, 1, 2)), [True] * 3)
    losses = pipe.run(2, forward, lambda *_: (width,))
    return weight.grad, str(losses.tolist())


def odd_work(rank: int) -> list[tuple[Tensor | None, str]]:
    return [odd(rank, "detached"), odd(rank, "empty")]


def test_outputs_without_gradient_and_empty_ones() -> None:
    first, middle, last = run_ranks(3, odd_work)
    assert torch.equal(first[0][0], torch.zeros(2))  # zeros have come back, through a stage that has no graph
    assert torch.equal(first[1][0], torch.zeros(2))  # of an empty output: its graph runs all the same
    assert middle[0][0] is None
    assert torch.equal(last[0][0], torch.full((2,), 6.0))
    assert [result[1] for result in last] == ["[48.0, 48.0]", "[6.0, 6.0]"]


def test_a_live_micro_batch_does_not_keep_its_output() -> None:
    hidden = torch.ones(3, requires_grad=True)
    output = hidden * 2
    live, kept = _Live(hidden, output, last=False), weakref.ref(output)
    del output
    assert kept() is None
    gradient = live.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert gradient is not None
    assert gradient.tolist() == [2, 4, 6]


def test_a_hidden_state_of_another_shape_is_not_sent() -> None:
    with pytest.raises(RankError, match=r"boundary 1 carries \(\(2,\), torch.float32\), not \(\(1,\), torch.float32\)"):
        run_ranks(3, odd, "wrong")
