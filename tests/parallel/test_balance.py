"""Cuts against all cuts there are, predicted times against the closed formulas."""

import random
from itertools import combinations_with_replacement, pairwise

import pytest

from megabts.errors import UsageError
from megabts.parallel.balance import (
    Cost,
    Costs,
    balanced_cuts,
    check_cuts,
    equal_cuts,
    fastest_cuts,
    predict,
    simulate,
    stages_with_backward,
)
from megabts.parallel.schedules import ScheduleKind, build_schedule


def costs(seed: int, num_layers: int) -> Costs:
    draw = random.Random(seed)

    def part(most: int) -> Cost:
        return Cost(draw.randint(0, most), draw.randint(0, most))

    return Costs(part(4), tuple(part(5) for _ in range(num_layers)), part(20))


@pytest.mark.parametrize("num_layers", [1, 3, 7])
def test_balanced_cuts_are_the_best_of_all(num_layers: int) -> None:
    for seed in range(30):
        model = costs(seed, num_layers)
        for num_stages in range(1, min(num_layers + 2, 5) + 1):

            def rank(cuts: tuple[int, ...], model: Costs = model) -> tuple[float, float, int]:
                totals = [stage.total for stage in model.of_stages(cuts)]
                lengths = [b - a for a, b in pairwise([0, *cuts, num_layers])]
                return max(totals), sum(t * t for t in totals), sum(n * n for n in lengths)

            every = combinations_with_replacement(range(num_layers + 1), num_stages - 1)
            assert rank(tuple(balanced_cuts(model, num_stages))) == min(map(rank, every)), (seed, num_stages)


def test_costs_of_stages() -> None:
    model = Costs(Cost(1, 0), (Cost(2, 3), Cost(4, 5), Cost(6, 7)), Cost(8, 9))
    assert model.of_stages([]) == [Cost(21, 24)]
    assert model.of_stages([0, 2, 3]) == [Cost(1, 0), Cost(6, 8), Cost(6, 7), Cost(8, 9)]


def test_equal_layers_are_cut_evenly() -> None:
    plain = Costs(Cost(), (Cost(1, 2),) * 8, Cost())
    assert balanced_cuts(plain, 4) == equal_cuts(8, 4) == [2, 4, 6]
    assert equal_cuts(10, 4) == [3, 6, 8]
    assert equal_cuts(5, 1) == []


def test_frozen_layers_go_together_and_a_heavy_head_stands_alone() -> None:
    """Six layers that only run forward, then six that pass gradient: cost 1 and 2."""
    model = Costs(Cost(), (Cost(1, 0),) * 6 + (Cost(1, 1),) * 6, Cost())
    assert balanced_cuts(model, 3) == [6, 9]
    assert balanced_cuts(Costs(Cost(), (Cost(1, 1),) * 4, Cost(4, 0)), 3) == [2, 4]
    assert balanced_cuts(Costs(Cost(4, 0), (Cost(1, 1),) * 4, Cost()), 3) == [0, 2]


def test_too_many_stages() -> None:
    model = Costs(Cost(1, 1), (Cost(1, 1),) * 2, Cost(1, 1))
    assert balanced_cuts(model, 4) == [0, 1, 2]
    with pytest.raises(UsageError, match=r"5 stages, more than embedding, 2 layers and head are parts; use 4 at most"):
        balanced_cuts(model, 5)


def test_fastest_cuts_are_not_slower_than_others() -> None:
    gained = 0
    for seed in range(12):
        model = costs(seed, 9)
        for schedule, p, chunks in (("none", 3, 1), ("1f1b", 4, 1), ("interleaved", 2, 2)):

            def seconds(cuts: list[int], model: Costs = model, how: tuple = (schedule, p, chunks)) -> float:
                return predict(model, cuts, how[1], 8, tokens=1, rate=1, schedule=how[0], chunks=how[2]).seconds

            fastest = fastest_cuts(model, p, 8, schedule=schedule, chunks=chunks)  # type: ignore[arg-type]
            others = [seconds(balanced_cuts(model, p * chunks)), seconds(equal_cuts(9, p * chunks))]
            assert check_cuts(fastest, 9, p * chunks) == fastest
            assert seconds(fastest) <= min(others)
            gained += seconds(fastest) < min(others)
    assert gained > 12
    assert fastest_cuts(costs(0, 3), 1, 8) == []


def test_interleaved_ranks_are_balanced_by_all_their_stages() -> None:
    """A head as heavy as a layer: its rank gets a lighter other stage, which the largest stage alone does not say."""
    model = Costs(Cost(), (Cost(1, 2),) * 7, Cost(1, 2))
    cuts = fastest_cuts(model, 2, 16, schedule="interleaved", chunks=2)
    found = predict(model, cuts, 2, 16, tokens=1, rate=1, schedule="interleaved", chunks=2)
    assert found.seconds == pytest.approx(16 * 4 * 3 + 3 * 2)


def test_given_cuts_are_checked() -> None:
    assert check_cuts([0, 3, 3], 3, 4) == [0, 3, 3]
    for wrong in ([1, 2], [2, 1, 3], [1, 2, 4], [-1, 1, 2]):
        with pytest.raises(UsageError, match=r"parallel.cuts is .*; 4 stages of 3 layers need .* \(3\), ascending"):
            check_cuts(wrong, 3, 4)


def test_backward_begins_at_the_first_that_costs_one() -> None:
    assert stages_with_backward([Cost(1), Cost(1, 1), Cost(1)]) == (False, True, True)
    assert stages_with_backward([Cost(1)] * 2) == (False, False)


def step(
    kind: ScheduleKind, p: int, m: int, chunks: int = 1, frozen: int = 0, transfer: float = 0.0
) -> tuple[float, float]:
    """Seconds and bubble of stages of 1/chunks forward and 2/chunks backward seconds."""
    needs = [stage >= frozen for stage in range(p * chunks)]
    ranks = [build_schedule(kind, p, rank, m, chunks, needs) for rank in range(p)]
    found = simulate(ranks, needs, [1 / chunks] * p * chunks, [2 / chunks] * p * chunks, transfer)
    return found.seconds, found.bubble


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_equal_stages_take_what_the_formulas_say(p: int) -> None:
    """Narayanan et al. (arXiv 2104.04473, section 2.2): (p-1)(f+b) of bubble, divided by the number of chunks."""
    for m in (p, 2 * p, 5 * p):
        assert step("1f1b", p, m) == pytest.approx((3 * (m + p - 1), (p - 1) / (m + p - 1)))
        assert step("none", p, m) == pytest.approx((3 * m * p, 1 - 1 / p))
        for chunks in (2, 4) if p > 1 else ():
            assert step("interleaved", p, m, chunks)[0] == pytest.approx(3 * m + 3 * (p - 1) / chunks)


def test_transfer_counts_on_the_way_there_and_back() -> None:
    assert step("1f1b", 3, 1, transfer=0.5)[0] == pytest.approx(3 * 3 + 4 * 0.5)
    assert step("1f1b", 3, 1, frozen=1, transfer=0.5)[0] == pytest.approx(3 + 2 + 2 + 3 * 0.5)


def test_frozen_stages_wait_for_nobody() -> None:
    """Of three stages one only runs forward: the step is that of the other two, one forward later."""
    assert step("1f1b", 3, 10, frozen=1)[0] == pytest.approx(1 + step("1f1b", 2, 10)[0])
    assert step("1f1b", 3, 10, frozen=3)[0] == pytest.approx(10 + 2)


def test_prediction_from_costs() -> None:
    model = Costs(Cost(), (Cost(100, 200),) * 4, Cost())
    found = predict(model, [2], 2, 6, tokens=10, rate=1000)
    assert found.seconds == pytest.approx((6 + 1) * 2 * 300 * 10 / 1000)
    assert found.bubble == pytest.approx(1 / 7)
