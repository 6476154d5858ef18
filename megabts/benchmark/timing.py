"""Timing contestants against each other in one run: round by round, so that what slows one slows the other too.

A ratio is taken within each round and its median reported: two times measured minutes apart differ by the machine's
mood, two times of one round hardly do. The spread is half the interquartile range, which one odd round does not move.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A number that was measured several times."""

    median: float
    spread: float
    """Half the interquartile range; 0 for a single measurement."""


def measure_of(values: Sequence[float]) -> Measure:
    """Median and spread of at least one value. Quartiles are interpolated between neighbours, as numpy does."""
    assert values, "nothing was measured"
    if len(values) == 1:
        return Measure(values[0], 0.0)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Measure(statistics.median(values), (high - low) / 2)


def ratio_of(dividends: Sequence[float], divisors: Sequence[float]) -> Measure:
    """Median and spread of the ratios of each round: `dividends[i] / divisors[i]`."""
    return measure_of([dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)])


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[float]]:
    """Seconds that each contestant took in each of `rounds` rounds, after `warm_up` rounds that do not count.

    A round runs every contestant once, every second round in reverse order (A B, B A, A B), so that nobody always
    runs on the heels of the same other. A contestant returns when its work is done: on a GPU it waits for the device.
    One that returns a float has measured itself, in seconds.
    """
    assert rounds >= 1
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            own = contestants[name]()
            taken = own if isinstance(own, float) else time.perf_counter() - start
            if number >= 0:
                seconds[name].append(taken)
            progress(f"{f'round {number + 1} of {rounds}' if number >= 0 else 'warm-up'}: {name} {taken:.3g} s")
    return seconds
