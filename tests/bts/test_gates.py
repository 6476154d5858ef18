"""Recorded gates against a computation by hand, and the recording's block."""

from dataclasses import replace

import pytest
import torch

from megabts.bts.gates import gate_places, record_gates
from megabts.model.attention import make_context
from tests.bts.output_gates import output_gates
from tests.bts.reference import config_of, random_model, run

TOKENS = torch.tensor([[3, 7, 1, 30, 12, 4], [0, 29, 5, 5, 18, 2]])


def test_record_of_each_stitch_layer() -> None:
    model = random_model(config_of(2, num_stitch_layers=2)).eval()
    states: dict[int, list[torch.Tensor]] = {}
    for index, stitch in enumerate(model.stitches.values()):
        stitch.register_forward_pre_hook(lambda _, args, index=index: states.update({index: args[0]}))
    with record_gates(model) as record:
        run(model, TOKENS)
    assert list(record.places) == [0, 1]
    weights = dict(model.named_parameters())

    (hie,) = record.places[0]
    assert hie.shape == (2, 6, 2)  # experts alone
    assert (hie.device.type, hie.dtype, hie.requires_grad) == ("cpu", torch.float32, False)
    for i, name in enumerate(("e1", "e2")):
        logits = states[0][0] @ weights[f"stitches.0.gates.{name}.weight"].T
        torch.testing.assert_close(hie[i], (1 / (1 + torch.exp(-logits))).mean(-1).detach())

    (eih,) = record.places[1]
    assert eih.shape == (3, 6, 2)  # the hub first
    torch.testing.assert_close(eih.sum(0), torch.ones(6, 2))
    powers = [torch.exp(states[1][0] @ weights[f"stitches.1.gates.{name}.weight"].T) for name in ("hub", "e1", "e2")]
    for i, power in enumerate(powers):
        torch.testing.assert_close(eih[i], (power / sum(powers)).mean(-1).detach())


def test_every_pass_inside_the_block_and_none_outside() -> None:
    model = random_model(config_of(num_stitch_layers=1))
    run(model, TOKENS)
    with record_gates(model) as record:
        run(model, TOKENS)
        run(model, TOKENS[:1, :3])
    run(model, TOKENS)
    assert [tuple(gates.shape) for gates in record.places[0]] == [(3, 6, 2), (3, 3, 1)]


def test_blocks_nest() -> None:
    model = random_model(config_of(num_stitch_layers=1))
    with record_gates(model) as outer:
        with record_gates(model) as inner:
            run(model, TOKENS)
        run(model, TOKENS[:, :2])
    assert [len(gates[0]) for gates in outer.places[0]] == [6, 2]
    assert [len(gates[0]) for gates in inner.places[0]] == [6]


def test_an_error_inside_ends_the_recording() -> None:
    model = random_model(config_of(num_stitch_layers=1))
    with record_gates(model) as outer:
        with pytest.raises(IndexError), record_gates(model) as inner:
            run(model, TOKENS + 1)  # token 31 of 31
        run(model, TOKENS)
    run(model, TOKENS)
    assert not inner.places
    assert len(outer.places[0]) == 1


def test_recording_changes_nothing() -> None:
    model = random_model(config_of(num_stitch_layers=3))
    plain = run(model, TOKENS)
    with record_gates(model):
        assert torch.equal(run(model, TOKENS), plain)


@pytest.mark.parametrize("evidence", [0, 3])
def test_a_mixture_s_output_is_the_last_place(evidence: int) -> None:
    model = random_model(config_of(2, num_stitch_layers=2, output="mixture", evidence=evidence)).eval()
    assert [place.title for place in gate_places(model)] == [
        "layer 2, Hub-into-Experts",
        "layer 5, Experts-into-Hub",
        "output mixture",
    ]
    assert [place.gates_hub for place in gate_places(model)] == [False, True, True]
    expected = torch.stack([output_gates(model, ids) for ids in TOKENS.tolist()], 1)  # [s, b, members]
    context = make_context(model.config, torch.arange(6), model.dtype, tokens=TOKENS)
    with record_gates(model) as record:
        hidden = run(model, TOKENS)
        assert list(record.places) == [0, 1]
        model.logits(hidden, context)
        model.logits(hidden, replace(context, memory={}), last=True)
        loss = model.loss(hidden, TOKENS.roll(-1, 1), torch.ones(2, 6))
    assert len(record.places[2]) == 3
    for gates in record.places[2]:
        assert (gates.shape, gates.dtype, gates.requires_grad) == ((3, 6, 2), torch.float32, False)
        torch.testing.assert_close(gates, expected.permute(2, 0, 1), rtol=0, atol=1e-5)
        torch.testing.assert_close(gates.sum(0), torch.ones(6, 2))
    assert expected.std(0).min() > 1e-3  # tokens differ
    assert torch.equal(loss, model.loss(hidden, TOKENS.roll(-1, 1), torch.ones(2, 6)))


def test_a_model_whose_hub_answers_has_stitch_layers_alone() -> None:
    model = random_model(config_of(num_stitch_layers=1)).eval()
    with record_gates(model) as record:
        model.logits(run(model, TOKENS))
    assert [place.title for place in gate_places(model)] == ["layer 5, Experts-into-Hub"]
    assert list(record.places) == [0]
