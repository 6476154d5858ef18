"""Places and kinds of the stitch layers, against the paper's examples and its rules for any L and K."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabts.bts.plan import Kind, StitchPoint, stitch_plan
from megabts.config.methods import BTSConfig
from megabts.errors import UsageError

EIH: Kind = "experts_into_hub"
HIE: Kind = "hub_into_experts"


def plan_of(layers: int, stitches: int, **settings: Any) -> list[StitchPoint]:
    return stitch_plan(layers, BTSConfig(num_stitch_layers=stitches, **settings))


@pytest.mark.parametrize(
    "layers, stitches, expected",
    [
        (20, 4, [(5, HIE), (10, EIH), (15, HIE), (20, EIH)]),
        (8, 3, [(2, EIH), (4, HIE), (8, EIH)]),
        (8, 1, [(8, EIH)]),
        (20, 10, [(at, EIH if at % 4 == 0 else HIE) for at in range(2, 21, 2)]),
        (1, 1, [(1, EIH)]),
        (3, 3, [(1, EIH), (2, HIE), (3, EIH)]),
    ],
)
def test_worked_examples(layers: int, stitches: int, expected: list[tuple[int, str]]) -> None:
    assert [(point.after, point.kind) for point in plan_of(layers, stitches)] == expected


def test_experts_into_hub_only_keeps_the_places() -> None:
    assert plan_of(8, 3, alternating=False) == [StitchPoint(at, EIH) for at in (2, 4, 8)]


@pytest.mark.parametrize("alternating", [True, False])
def test_more_stitch_layers_than_layers(alternating: bool) -> None:
    with pytest.raises(UsageError, match=r"num_stitch_layers 5 is more than the members' 4 layers"):
        plan_of(4, 5, alternating=alternating)


@given(st.integers(1, 200).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))), st.booleans())
def test_any_plan(sizes: tuple[int, int], alternating: bool) -> None:
    layers, stitches = sizes
    plan = plan_of(layers, stitches, alternating=alternating)
    places = [0, *(point.after for point in plan)]
    assert len(plan) == stitches
    assert plan[-1] == StitchPoint(layers, EIH)
    gaps = [after - before for before, after in pairwise(places)]
    assert all(gap == layers // stitches for gap in gaps[:-1])
    assert gaps[-1] == layers - (stitches - 1) * (layers // stitches)
    kinds = [point.kind for point in plan]
    if alternating:
        assert all(before != after for before, after in pairwise(kinds))
    else:
        assert set(kinds) == {EIH}


@pytest.mark.parametrize(
    "placement, expected",
    [
        ([5, 6, 7, 8], [(5, HIE), (6, EIH), (7, HIE), (8, EIH)]),
        ([1, 2, 8], [(1, EIH), (2, HIE), (8, EIH)]),
        ([8], [(8, EIH)]),
    ],
)
def test_a_placement_keeps_the_rule_of_the_kinds(placement: list[int], expected: list[tuple[int, str]]) -> None:
    plan = plan_of(8, len(placement), placement=placement)
    assert [(point.after, point.kind) for point in plan] == expected
    one_kind = plan_of(8, len(placement), placement=placement, alternating=False)
    assert one_kind == [StitchPoint(at, EIH) for at in placement]


@pytest.mark.parametrize("stitches", [1, 3, 4, 8])
def test_even_places_given_are_even_places(stitches: int) -> None:
    even = plan_of(8, stitches)
    assert plan_of(8, stitches, placement=[point.after for point in even]) == even


@pytest.mark.parametrize(
    "placement, message",
    [
        ([2, 8], r"\[2, 8\] has 2 layers, but bts\.num_stitch_layers is 3; set bts\.num_stitch_layers 2, or another"),
        ([4, 2, 8], r"\[4, 2, 8\]; give layers from 1 on, each once, in ascending order$"),
        ([2, 2, 8], r"\[2, 2, 8\]; give layers from 1 on, each once, in ascending order$"),
        ([0, 2, 8], r"\[0, 2, 8\]; give layers from 1 on, each once, in ascending order$"),
        ([2, 4, 7], r"\[2, 4, 7\] ends with layer 7; end it with the members' last layer, 8$"),
        ([2, 8, 9], r"\[2, 8, 9\] ends with layer 9; end it with the members' last layer, 8$"),
    ],
)
def test_placements_that_are_none(placement: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=rf"^bts\.placement (is )?{message}"):
        plan_of(8, 3, placement=placement)
