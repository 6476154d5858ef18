"""Gates with every event of a batch, against those of whole texts run through the model by themselves."""

import dataclasses

import pytest
import torch

from megabts.bts.gates import record_gates
from megabts.bts.model import BTSModel
from megabts.config.run import ParallelConfig
from megabts.errors import UsageError
from megabts.inference.engine import Engine
from megabts.inference.generate import score
from megabts.inference.ranks import follow
from megabts.inference.row_gates import Gates
from megabts.inference.rows import Event, Request
from megabts.inference.settings import GenerationSettings
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.parallel.sharding import named_metas
from tests.bts.output_gates import output_gates
from tests.inference.models import BTS, build, shake, stitched
from tests.inference.test_ranks import local_model
from tests.parallel.stitched import LABELS, TOKENS, Case, train, whole_model
from tests.parallel.stitched import local_model as local_model_of
from tests.ranks import run_ranks

PROMPTS = ([5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7], [11, 3])


def oracle(model: BTSModel, tokens: list[int], eod_id: int | None = None) -> list[Gates]:
    """At every position of one text, from one forward pass without a cache."""
    with torch.inference_mode(), record_gates(model) as record:
        score(model, tokens, eod_id)
    output = output_gates(model, tokens, eod_id) if model.mixes else None
    positions = []
    for place in range(len(tokens)):
        layers: list[tuple[float | None, ...]] = []
        for index, point in enumerate(model.plan):
            weights = record.places[index][0][:, place, 0].tolist()
            layers.append(tuple(weights) if point.kind == "experts_into_hub" else (None, *weights))
        positions.append((*layers, *([] if output is None else [tuple(output[place].tolist())])))
    return positions


def flat(gates: Gates) -> list[float]:
    return [-1.0 if weight is None else weight for layer in gates for weight in layer]


def check(engine: Engine, model: BTSModel, eod_id: int | None = None) -> None:
    """Some rows begin while others go on. One does not ask."""
    events: dict[int, list[Event]] = {}
    rows = [
        engine.submit(Request(prompt, GenerationSettings(3 + number, eod_id=eod_id), gates=number != 1))
        for number, prompt in enumerate(PROMPTS)
    ]
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    assert all(event.gates == event.prompt_gates == () for event in events[1])
    for number in (0, 2, 3):
        prompt, tokens, told = PROMPTS[number], rows[number].tokens, events[number]
        expected = oracle(model, [*prompt, *tokens], eod_id)
        found = [*told[0].prompt_gates, *(event.gates for event in told[1:])]
        assert len(found) == len(prompt) + len(tokens) - 1
        for position, gates in enumerate(found):
            assert flat(gates) == pytest.approx(flat(expected[position]), abs=2e-5)
            assert sum(weight or 0 for weight in gates[-1]) == pytest.approx(1, abs=1e-5)
        assert told[0].gates == told[0].prompt_gates[-1]
        assert all(event.prompt_gates == () for event in told[1:])


@pytest.mark.parametrize("name", ["bts-alternating", "bts-unchanged", "bts-mixture", "bts-evidence"])
def test_every_row_sees_its_own(name: str) -> None:
    model = build(name)
    assert isinstance(model, BTSModel)
    check(Engine(model, 2, 64), model)


@pytest.mark.parametrize("name", ["alternating", "evidence"])
def test_a_document_s_end_is_where_its_gates_forget(name: str) -> None:
    """Token 2 ends one; a prompt has it within, or last."""
    model = stitched({"cross_document_attention": False}, **BTS[name])
    check(Engine(model, 2, 64), model, eod_id=2)


def local(case: str, mesh: ParallelMesh) -> BTSModel:
    """This rank's part of a random model."""
    model = local_model(case, mesh)
    whole = local_model(case, ParallelMesh())
    shake(whole)
    with torch.no_grad():
        metas = {name: meta for name, _, meta in named_metas(model)}
        weights = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(metas[name].shard(weights[name], mesh.tp))
    assert isinstance(model, BTSModel)
    return model


def work(rank: int) -> None:
    for case, tensor, expert in (("mixture", 2, 1), ("bts", 1, 2)):
        mesh = build_mesh(ParallelConfig(tensor=tensor, expert=expert), 2, rank)
        if rank > 0:
            follow(local(case, mesh), 64, mesh)
            continue
        with Engine(local(case, mesh), 2, 64, mesh=mesh) as engine:
            check(engine, local(case, ParallelMesh()))
    # Under sequence parallelism a rank's states are of some positions, and the gates of all.
    mesh = build_mesh(ParallelConfig(tensor=2, sequence=True), 2, rank)
    form = Case(2, {"output": "mixture", "evidence": 3})
    model, whole = local_model_of(form, mesh, sequence=True), whole_model(form)
    with record_gates(model) as record:
        train(model)
    (gates,) = record.places[len(model.plan)]
    for row, ids in enumerate(TOKENS.tolist()):
        # The loss knows tokens by its labels, the last one of which is read by nobody.
        text = [ids[0], *LABELS[row, :-1].tolist()]
        assert text == ids
        torch.testing.assert_close(gates[:, :, row].T, output_gates(whole, ids), rtol=0, atol=1e-5)


def test_on_two_ranks() -> None:
    run_ranks(2, work)


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
