"""Keys and values of the tokens so far, so that a decode step computes one token instead of all of them.

A member's cache is one buffer of a set number of tokens, [layers, 2, kv_heads, capacity, hd], allocated before the
first token: memory cannot run out half way. A row takes a stretch of neighbouring tokens, as long as it can become
(`Stretches`), and gives it back when it ends: rows of any length live side by side, and none pays for another's. Heads
come first, since attention reads one head's keys over all positions, which are then neighbours in memory. A BTS model
needs one cache per member, BAM one per attention expert: each has its own keys. They are parts of one buffer, by heads.

Attention wants the rows of a batch in one tensor. For one row, or rows whose stretches lie at equal distances, that is
a view of the buffer; else the rows are gathered, one layer at a time. `Prefill` and `Decode` say where the rows of one
forward pass lie.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from megabts.config.model import ModelConfig

WIDTHS = 256
"""What `bucket` rounds to."""


class Stretches:
    """Which tokens of a buffer are free. A stretch is (start, size)."""

    def __init__(self, capacity: int) -> None:
        self._free = [(0, capacity)]

    def take(self, size: int) -> int | None:
        """Start of `size` neighbouring tokens, the first that are free; None when there are none."""
        for index, (start, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(start + size, free - size)] if free > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Make a stretch free again."""
        insort(self._free, (start, size))
        merged: list[tuple[int, int]] = []
        for first, length in self._free:
            if merged and sum(merged[-1]) == first:
                first, length = merged[-1][0], merged.pop()[1] + length
            merged.append((first, length))
        self._free = merged


class Places(Protocol):
    """Where the rows of one forward pass lie in a buffer."""

    def store(self, stored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put [s, b, kv_heads, hd] into a layer's buffer [2, kv_heads, capacity, hd]; returns all that rows have."""
        ...

    def of_rows(self, rows: Tensor) -> "Places":
        """For these rows [r] of the batch alone."""
        ...


@dataclass(frozen=True)
class Prefill:
    """Rows that begin: what they attend to is what they bring. They are padded on the left, to s tokens."""

    stretches: Sequence[tuple[int, int]]
    """(start, tokens) of each row."""

    def store(self, stored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Places`: returns [s, b, kv_heads, hd] as they came."""
        for row, (start, length) in enumerate(self.stretches):
            for part, new in zip(stored, (key, value), strict=True):
                part[:, start : start + length].copy_(new[-length:, row].transpose(0, 1))
        return key, value

    def of_rows(self, rows: Tensor) -> "Prefill":
        """See `Places`."""
        return Prefill([self.stretches[row] for row in rows.tolist()])


@dataclass(frozen=True)
class Decode:
    """Rows that add one token. Column j of what is returned is a row's position j; the rest is to be masked."""

    starts: Tensor
    """Of the rows' stretches, [b]."""
    lengths: Tensor
    """Tokens of the rows, the new one included, [b]."""
    width: int
    """The largest length."""
    distance: int | None
    """Between a row's start and the next one's; None where they differ, or a view would leave the buffer."""
    first: int
    """Start of the first row."""
    index: Tensor | None
    """Where there is no view: what to gather, [b width]."""
    place: int | None = None
    """Of the new token, where it is known here, of one row."""

    @classmethod
    def of(cls, starts: Sequence[int], lengths: Sequence[int], capacity: int, device: torch.device) -> "Decode":
        """Of rows at these starts with these lengths."""
        width = max(lengths)
        distance = _distance(starts) if starts[-1] + width <= capacity else None
        places = torch.tensor([starts, lengths], device=device)
        if distance is None:
            return cls.at(places[0], places[1], width)
        place = starts[0] + width - 1 if len(starts) == 1 else None
        return cls(places[0], places[1], width, distance, starts[0], None, place)

    @classmethod
    def at(cls, starts: Tensor, lengths: Tensor, width: int, distance: int | None = None, first: int = 0) -> "Decode":
        """Of rows that tensors know alone, as a recorded step has them; the numbers are those of `bucket`."""
        return cls(
            starts, lengths, width, distance, first, _columns(starts, lengths, width) if distance is None else None
        )

    def store(self, stored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Places`: returns [width, b, kv_heads, hd]."""
        rows = len(self.starts)
        if self.place is not None:
            last = stored.select(2, self.place).unbind(0)
            last[0].copy_(key[0, 0])
            last[1].copy_(value[0, 0])
        else:
            ends = self.starts + self.lengths - 1
            stored[0].index_copy_(1, ends, key[0].transpose(0, 1))
            stored[1].index_copy_(1, ends, value[0].transpose(0, 1))
        if self.distance is not None:
            reach = (rows - 1) * self.distance + self.width
            seen = stored.narrow(2, self.first, reach).unfold(2, self.width, self.distance)
            found = seen.permute(0, 4, 2, 1, 3)  # of [2, kv_heads, b, hd, width]
        else:
            assert self.index is not None
            found = stored.index_select(2, self.index).unflatten(2, (rows, self.width)).permute(0, 3, 2, 1, 4)
        keys, values = found.unbind(0)
        return keys, values

    def of_rows(self, rows: Tensor) -> "Decode":
        """See `Places`; as wide as all rows are."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        return Decode(starts, lengths, self.width, None, 0, _columns(starts, lengths, self.width))


def bucket(starts: Sequence[int], lengths: Sequence[int], capacity: int) -> tuple[int, int | None, int]:
    """Width, distance and first of `Decode` for rows at these starts, which stay the same for up to WIDTHS steps.

    The width is rounded up, if the buffer has so many tokens where rows are viewed; columns from a row's length on are
    another row's, or its last again, and must be masked.
    """
    longest = max(lengths)
    width, room, distance = -(-longest // WIDTHS) * WIDTHS, capacity - starts[-1], _distance(starts)
    if distance is None or room < longest:
        return width, None, 0
    return min(width, room), distance, starts[0]


def _distance(starts: Sequence[int]) -> int | None:
    """Between each start and the next, where it is the same for all, and no start before the one that it follows."""
    apart = {after - before for before, after in pairwise(starts)} or {1}
    distance = apart.pop()
    return None if apart or distance <= 0 else distance


def _columns(starts: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Place in the buffer of every column of every row, [b width]; beyond a row's end its last one again."""
    columns = torch.arange(width, device=starts.device)
    return (starts.unsqueeze(1) + torch.minimum(columns, lengths.unsqueeze(1) - 1)).flatten()


class KVCache:
    """One member's keys and values: a `LayerCache`, of the rows at `places`."""

    def __init__(self, stored: Tensor, places: Places) -> None:
        self.stored = stored
        self.places = places

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        tp: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        members: int = 1,
    ) -> "KVCache":
        """Room for `capacity` tokens of all members. Zeros: what is masked must be finite all the same."""
        return cls(torch.zeros(_shape(config, tp, capacity, members), dtype=dtype, device=device), Prefill([]))

    def split(self, members: int) -> "list[KVCache]":
        """Each member's part: its heads are neighbours."""
        return [KVCache(part, self.places) for part in self.stored.chunk(members, 2)]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [s, b, kv_heads, hd] of the rows; returns keys and values [t, b, kv_heads, hd] of all so far."""
        return self.places.store(self.stored[layer], key, value)

    def of_rows(self, rows: Tensor) -> "KVCache":
        """The same buffer, for these rows [r] of the batch alone."""
        return KVCache(self.stored, self.places.of_rows(rows))


def cache_bytes(config: ModelConfig, tp: int, capacity: int, dtype: torch.dtype) -> int:
    """Memory of one member's cache on one of `tp` ranks, bytes, without allocating it."""
    return torch.Size(_shape(config, tp, capacity)).numel() * dtype.itemsize


def _shape(config: ModelConfig, tp: int, capacity: int, members: int = 1) -> tuple[int, ...]:
    return config.num_layers, 2, members * max(1, config.num_kv_heads // tp), capacity, config.head_dim
