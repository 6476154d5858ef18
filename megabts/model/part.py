"""What of a model one pipeline rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Layers of this rank's virtual stages, and whether embedding and head are here."""

    chunks: tuple[range, ...]
    """Layers of each virtual stage, in ascending order; a range may be empty."""
    embedding: bool
    head: bool
    """Final norm and head."""
    cuts: tuple[int, ...] = ()
    """Layers before each boundary between virtual stages, over the whole pipeline."""

    @classmethod
    def whole(cls, num_layers: int) -> "Part":
        """All of a model: one stage."""
        return cls((range(num_layers),), embedding=True, head=True)

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, num_layers: int, cuts: Sequence[int], chunks: int = 1) -> "Part":
        """What a pipeline rank holds: virtual stages `rank`, `rank + num_ranks`, ...; the embedding and the head are in
        the first and the last one."""
        bounds = [0, *cuts, num_layers]
        mine = (range(bounds[k], bounds[k + 1]) for k in range(rank, num_ranks * chunks, num_ranks))
        return cls(tuple(mine), rank == 0, rank == num_ranks - 1, tuple(cuts))

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of all layers here, in ascending order."""
        return tuple(layer for chunk in self.chunks for layer in chunk)
