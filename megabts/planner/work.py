"""What one rank holds and does for one part of a model: the figures that every method gives.

A method is a function from a run's configuration (with its layout in it) and a place on the expert-parallel axis to
`Parts`. Memory and time are computed from these alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megabts.config.run import RunConfig
from megabts.errors import UsageError

_VALUE_BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Work:
    """One part on one rank (tensor-parallel rank 0, which never has less than another), for one micro-batch."""

    parameters: int = 0
    """Elements held."""
    trainable: int = 0
    """Of these, elements that train."""
    spread: int = 0
    """Of `trainable`, elements that no other expert-parallel rank has, where these ranks have samples of their own:
    their gradients are summed over dp, others' over dp and ep."""
    kept: float = 0.0
    """Bytes that autograd keeps from forward to backward."""
    entry: float = 0.0
    """Of `kept`, the hidden states that enter: on a later pipeline stage they are the message received."""
    working: float = 0.0
    """Bytes that exist besides while the part runs forward or backward, at most."""
    again: float = 0.0
    """Operations that backward does again (selective recomputation; full is in the costs)."""
    moved: tuple[float, float] = (0.0, 0.0)
    """Bytes that element-wise work moves through the GPU's memory: forward, backward."""
    tensor: tuple[float, float] = (0.0, 0.0)
    """Bytes that the rank sends over the tensor-parallel axis: forward, backward."""
    expert: tuple[float, float] = (0.0, 0.0)
    """Bytes that the busiest direction of the rank's link carries over the expert-parallel axis."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.parameters + other.parameters,
            self.trainable + other.trainable,
            self.spread + other.spread,
            self.kept + other.kept,
            self.entry + other.entry,
            max(self.working, other.working),
            self.again + other.again,
            (self.moved[0] + other.moved[0], self.moved[1] + other.moved[1]),
            (self.tensor[0] + other.tensor[0], self.tensor[1] + other.tensor[1]),
            (self.expert[0] + other.expert[0], self.expert[1] + other.expert[1]),
        )

    def times(self, count: int) -> "Work":
        """`count` of it, one after the other."""
        return sum((self for _ in range(count)), Work())


@dataclass(frozen=True)
class Parts:
    """A model on one rank of every pipeline stage, in order; a layer has with it the stitch that follows it."""

    embedding: Work
    layers: tuple[Work, ...]
    head: Work
    """Final norm, head and loss."""
    tied: int = 0
    """Trainable elements of the head that are the embedding's, held once where one rank has both."""
    largest: int = 0
    """Elements of the largest trainable parameter."""
    states: int = 1
    """Hidden states that pass from stage to stage: one a member."""

    def stages(self, cuts: Sequence[int], state: float) -> tuple[Work, ...]:
        """Sums over the virtual stages; `state`: bytes of one hidden state.

        A stage that is not the first keeps the message it received, whole, in place of what enters its first part.
        """
        bounds = [0, *cuts, len(self.layers)]
        stages: list[Work] = []
        for first, last in pairwise(bounds):
            works = list(self.layers[first:last])
            if len(stages) == len(cuts):
                works.append(self.head)
            if stages:
                entry = works[0].entry if works else 0.0
                works.append(Work(kept=self.states * state - entry))
            else:
                works.append(self.embedding)
            stages.append(sum(works, Work()))
        return tuple(stages)


def value_bytes(config: RunConfig) -> int:
    """Bytes of a weight or activation. Raises UsageError for float64, of which GPUs have no peak worth planning, and
    for members in another dtype than what trains."""
    dtype = config.precision.dtype
    if dtype not in _VALUE_BYTES:
        raise UsageError(f"precision.dtype {dtype} is not planned for; use bfloat16 or float32")
    if config.precision.frozen != "same":
        raise UsageError(f"precision.frozen {config.precision.frozen} is not planned for; leave it at same")
    return _VALUE_BYTES[dtype]


def rows(config: RunConfig) -> int:
    """Positions of one micro-batch: s b."""
    return config.data.seq_length * config.train.micro_batch


def slice_share(config: RunConfig) -> float:
    """Share of the positions that a rank has outside tensor-parallel regions."""
    return 1 / config.parallel.tensor if config.parallel.sequence else 1.0


def state_bytes(config: RunConfig) -> float:
    """Bytes of one member's hidden state between layers, of one micro-batch."""
    return slice_share(config) * rows(config) * config.model.hidden_size * value_bytes(config)
