"""What members count for each row of a batch: mean gates of every place (`bts.gates`), as one step saw them.

A gate belongs to the position whose hidden state it mixes, or whose probabilities of the next token. The last position
of a row's forward pass is the one that its next token is chosen at.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megabts.bts.gates import GatePlace, gate_places
from megabts.bts.model import BTSModel
from megabts.model.decoder import Model

Gates = tuple[tuple[float | None, ...], ...]
"""Of one position: for every place each member's weight, the hub's first; None for a hub that has no gate.

Experts-into-Hub: shares of the hub's new state, which sum to 1. Hub-into-Experts: what the hub's state takes of each
expert's new one; the hub itself has no gate there. Output mixture: shares of the next token's probabilities, which sum
to 1."""


@dataclass(frozen=True)
class RowGates:
    """Of one row in one step."""

    last: Gates
    """At the position that the token was chosen at."""
    prompt: tuple[Gates, ...] = ()
    """At every position of the prompt, in the step that read it."""


@contextmanager
def observe_gates(model: Model, wanted: bool) -> Iterator[list[Tensor]]:
    """Inside the block the list takes the mean gates [members gated, s, b] of every place that is passed, in order.

    Ranks that run one model must observe alike.
    """
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return
    assert isinstance(model, BTSModel)
    with model.observe_gates(lambda _, means: seen.append(means)):
        yield seen


def row_gates(model: Model, seen: Sequence[Tensor], num_kept: int, lengths: Sequence[int]) -> list[RowGates]:
    """Each row's, from the gates of one step: of the rows that went on, then of new ones with prompts this long."""
    assert isinstance(model, BTSModel)
    places = gate_places(model)
    assert len(seen) == len(places) * (bool(num_kept) + bool(lengths)), "a forward pass for each kind of rows"
    rows = []
    if num_kept:
        rows += [RowGates(last) for (last,) in _positions(places, seen[: len(places)], [1] * num_kept)]
    if lengths:
        rows += [RowGates(prompt[-1], tuple(prompt)) for prompt in _positions(places, seen[-len(places) :], lengths)]
    return rows


def _positions(places: Sequence[GatePlace], gates: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Gates]]:
    """The gates at the last positions of each row, as many as its prompt is long: it is padded on the left."""
    columns = torch.cat(list(gates)).permute(2, 1, 0).tolist()  # one transfer: [b, s, members of all places]
    counts = [len(means) for means in gates]
    return [
        [_by_place(places, counts, weights) for weights in row[len(row) - length :]]
        for row, length in zip(columns, lengths, strict=True)
    ]


def _by_place(places: Sequence[GatePlace], counts: Sequence[int], weights: Sequence[float]) -> Gates:
    found, begin = [], 0
    for place, count in zip(places, counts, strict=True):
        found.append((*(() if place.gates_hub else (None,)), *weights[begin : begin + count]))
        begin += count
    return tuple(found)
