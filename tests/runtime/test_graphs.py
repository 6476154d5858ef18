"""What is recorded, when, what a replay reads and returns, and which graphs are kept. Decode steps: inference/."""

import logging

import pytest
import torch
from torch import Tensor

from megabts.runtime.graphs import Graphs, Record, Work, recorder

CPU = torch.device("cpu")


def double(inputs: Tensor, add: int | None, times: int = 1) -> Tensor:
    return inputs * 2 * times + (add or 0)


class Watched:
    """A `Record` that runs the call again where a graph would be launched; it says what was done."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, work: Work) -> Work:
        out = work()
        self.seen.append("record")

        def replay() -> Tensor:
            self.seen.append("replay")
            return out.copy_(work())

        return replay

    def taken(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


def test_what_comes_often_is_recorded_and_what_it_reads_is_new() -> None:
    record = Watched()
    call = Graphs(record, after=2)
    inputs, results = torch.zeros(2), list[Tensor]()
    expected: list[list[str]] = [[]] * 2 + [["record", "replay"]] + [["replay"]] * 2
    for step, done in enumerate(expected):
        inputs.fill_(step)  # the caller's tensor, which it may change, or throw away
        results.append(call(double, inputs.clone(), 1))
        inputs.fill_(-9)
        assert record.taken() == done
    assert [result.tolist() for result in results] == [[2 * step + 1] * 2 for step in range(5)]  # all are kept


def test_shapes_and_numbers_have_their_own() -> None:
    record = Watched()
    call = Graphs(record, after=1)
    for count in (1, 2, 3):
        for size, *numbers in ((2, 1), (3, 1), (2, None), (2, 1, 3)):
            inputs = torch.arange(float(size))
            assert torch.equal(call(double, inputs, *numbers), double(inputs, *numbers))
        assert record.taken() == [[], ["record", "replay"] * 4, ["replay"] * 4][count - 1]


def test_those_used_last_are_kept() -> None:
    record = Watched()
    call = Graphs(record, after=0, limit=2)
    one, two, three = (torch.ones(size) for size in (1, 2, 3))
    for inputs in (one, two, one, three, one):  # two goes
        call(double, inputs, 0)
    record.taken()
    call(double, one, 0)
    assert record.taken() == ["replay"]
    call(double, two, 0)
    assert record.taken() == ["record", "replay"]


def test_what_cannot_be_recorded_runs(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[Work] = []

    def refuse(work: Work) -> Work:
        tried.append(work)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ..")

    call = Graphs(refuse, after=1)
    for step in range(4):
        for size in (2, 3):
            assert call(double, torch.full((size,), float(step)), 1).tolist() == [2 * step + 1] * size
    assert len(tried) == 1
    assert caplog.messages == [
        "a step could not be recorded as a CUDA graph (CUDA error: operation not permitted when stream is capturing): "
        "steps run without"
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_cpu_has_no_graphs() -> None:
    assert recorder(CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_reads_what_is_new() -> None:
    device = torch.device("cuda")
    record: Record | None = recorder(device)
    assert record is not None
    weight, held = torch.randn(64, 64, device=device), torch.zeros(8, 64, device=device)

    def step(inputs: Tensor, row: int) -> Tensor:
        held[row].copy_(inputs[0])
        return (held @ weight).cumsum(0)

    call = Graphs(record, after=1)
    with torch.inference_mode():
        for count in range(5):
            for row in (0, 3):
                inputs = torch.full((1, 64), float(count + row), device=device)
                torch.testing.assert_close(call(step, inputs, row), (held @ weight).cumsum(0))
                assert held[row].eq(count + row).all()
