"""Statistics against hand-made numbers and numpy, and the order in which contestants run."""

import time

import numpy as np
import pytest

from megabts.benchmark.timing import Measure, interleaved, measure_of, ratio_of


def test_median_and_half_the_interquartile_range() -> None:
    assert measure_of([5.0, 1.0, 4.0, 2.0, 3.0]) == Measure(3.0, 1.0)  # quartiles 2 and 4
    assert measure_of([1.0, 2.0]) == Measure(1.5, 0.25)
    assert measure_of([7.0]) == Measure(7.0, 0.0)
    assert measure_of([1.0, 2.0, 3.0, 4.0, 1000.0]) == Measure(3.0, 1.0)  # one odd round moves neither


@pytest.mark.parametrize("size", [2, 3, 4, 8, 9])
def test_quartiles_are_numpys(size: int) -> None:
    values = np.random.default_rng(size).random(size)
    low, median, high = np.percentile(values, [25, 50, 75])
    measure = measure_of(values.tolist())
    assert measure.median == pytest.approx(median, abs=1e-15)
    assert measure.spread == pytest.approx((high - low) / 2, abs=1e-15)


def test_a_ratio_is_taken_round_by_round() -> None:
    # the second round was twice as slow for both: the ratio does not see it, the ratio of medians would
    assert ratio_of([2.0, 4.0, 3.0], [1.0, 2.0, 1.0]) == Measure(2.0, 0.25)
    with pytest.raises(ValueError, match="argument"):
        ratio_of([1.0, 2.0], [1.0])


def test_contestants_take_turns_and_warm_up_does_not_count() -> None:
    ran: list[str] = []
    lines: list[str] = []
    contestants = {"a": lambda: ran.append("a"), "b": lambda: time.sleep(0.02), "c": lambda: ran.append("c")}
    seconds = interleaved(contestants, 3, 1, lines.append)
    assert "".join(ran) == "ca" + "ac" + "ca" + "ac"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(seconds["b"]) >= 0.02 > max(seconds["a"])
    assert lines[0].startswith("warm-up: c ")
    assert lines[-1].startswith("round 3 of 3: c ")
