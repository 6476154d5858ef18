"""Places and kinds of the stitch layers, against the paper's examples and its rules for any L and K."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabts.bts.plan import Kind, StitchPoint, stitch_plan
from megabts.errors import UsageError

EIH: Kind = "experts_into_hub"
HIE: Kind = "hub_into_experts"


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
    assert [(point.after, point.kind) for point in stitch_plan(layers, stitches)] == expected


def test_experts_into_hub_only_keeps_the_places() -> None:
    assert stitch_plan(8, 3, alternating=False) == [StitchPoint(at, EIH) for at in (2, 4, 8)]


@pytest.mark.parametrize("alternating", [True, False])
def test_more_stitch_layers_than_layers(alternating: bool) -> None:
    with pytest.raises(UsageError, match=r"num_stitch_layers 5 is more than the members' 4 layers"):
        stitch_plan(4, 5, alternating)


@given(st.integers(1, 200).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))), st.booleans())
def test_any_plan(sizes: tuple[int, int], alternating: bool) -> None:
    layers, stitches = sizes
    plan = stitch_plan(layers, stitches, alternating)
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
