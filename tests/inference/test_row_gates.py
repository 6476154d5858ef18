"""Gates with every event of a batch, against those of whole texts run through the model by themselves."""

import dataclasses

import pytest
import torch

from megabts.bts.gates import record_gates
from megabts.bts.model import BTSModel
from megabts.errors import UsageError
from megabts.inference.engine import Engine
from megabts.inference.generate import score
from megabts.inference.row_gates import Gates
from megabts.inference.rows import Event, Request
from megabts.inference.settings import GenerationSettings
from tests.inference.models import build

PROMPTS = ([5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7], [11, 3])


def oracle(model: BTSModel, tokens: list[int]) -> list[Gates]:
    """At every position of one text, from one forward pass without a cache."""
    with torch.inference_mode(), record_gates(model) as record:
        score(model, tokens)
    positions = []
    for place in range(len(tokens)):
        layers = []
        for index, point in enumerate(model.plan):
            weights = record.layers[index][0][:, place, 0].tolist()
            layers.append(tuple(weights) if point.kind == "experts_into_hub" else (None, *weights))
        positions.append(tuple(layers))
    return positions


def flat(gates: Gates) -> list[float]:
    return [-1.0 if weight is None else weight for layer in gates for weight in layer]


@pytest.mark.parametrize("name", ["bts-alternating", "bts-unchanged", "bts-mixture"])
def test_every_row_sees_its_own(name: str) -> None:
    model = build(name)
    assert isinstance(model, BTSModel)
    events: dict[int, list[Event]] = {}
    # Two rows at a time: some begin while others go on. One row does not ask.
    engine = Engine(model, 2, 64)
    rows = [
        engine.submit(Request(prompt, GenerationSettings(3 + number), gates=number != 1))
        for number, prompt in enumerate(PROMPTS)
    ]
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    assert all(event.gates == event.prompt_gates == () for event in events[1])
    for number in (0, 2, 3):
        prompt, tokens, told = PROMPTS[number], rows[number].tokens, events[number]
        expected = oracle(model, [*prompt, *tokens])
        found = [*told[0].prompt_gates, *(event.gates for event in told[1:])]
        assert len(found) == len(prompt) + len(tokens) - 1
        for position, gates in enumerate(found):
            assert flat(gates) == pytest.approx(flat(expected[position]), abs=2e-5)
        assert told[0].gates == told[0].prompt_gates[-1]
        assert all(event.prompt_gates == () for event in told[1:])


def test_observing_changes_no_token() -> None:
    model = build("bts-alternating")
    asked = Request([5, 9, 2], GenerationSettings(8))
    tokens = []
    for request in (asked, dataclasses.replace(asked, gates=True)):
        engine = Engine(model, 1, 32)
        row = engine.submit(request)
        while engine.busy:
            engine.step()
        tokens.append(row.tokens)
    assert tokens[0] == tokens[1]


def test_a_model_without_gates_refuses() -> None:
    with pytest.raises(UsageError, match="gates are asked for, and the model has none"):
        Engine(build("dense-gqa"), 1, 32).submit(Request([1], GenerationSettings(4), gates=True))
