"""Ranges [a, b) of rows or elements, in which shards of flat buffers, slices of parameters and stored pieces are told.

Lists of ranges ascend.
"""

from collections.abc import Iterable, Iterator

Range = tuple[int, int]


def overlap(a: Range, b: Range) -> Range:
    """What two ranges have in common; the end is not above the start where that is nothing."""
    return max(a[0], b[0]), min(a[1], b[1])


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same elements in fewer ranges: neighbours become one."""
    result: list[Range] = []
    for a, b in ranges:
        if result and result[-1][1] == a:
            a = result.pop()[0]
        result.append((a, b))
    return result


def without(whole: Range, holes: Iterable[Range]) -> Iterator[Range]:
    """What is left of a range."""
    start, end = whole
    for first, last in holes:
        if start < min(first, end):
            yield start, min(first, end)
        start = max(start, last)
    if start < end:
        yield start, end
