"""What of a model one pipeline rank holds."""

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

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of all layers here, in ascending order."""
        return tuple(layer for chunk in self.chunks for layer in chunk)
