"""Recorded gates against a computation by hand, and the recording's block."""

import pytest
import torch

from megabts.bts.gates import record_gates
from tests.bts.reference import config_of, random_model, run

TOKENS = torch.tensor([[3, 7, 1, 30, 12, 4], [0, 29, 5, 5, 18, 2]])


def test_record_of_each_stitch_layer() -> None:
    model = random_model(config_of(2, num_stitch_layers=2)).eval()
    states: dict[int, list[torch.Tensor]] = {}
    for index, stitch in enumerate(model.stitches.values()):
        stitch.register_forward_pre_hook(lambda _, args, index=index: states.update({index: args[0]}))
    with record_gates(model) as record:
        run(model, TOKENS)
    assert list(record.layers) == [0, 1]
    weights = dict(model.named_parameters())

    (hie,) = record.layers[0]
    assert hie.shape == (2, 6, 2)  # experts alone
    assert (hie.device.type, hie.dtype, hie.requires_grad) == ("cpu", torch.float32, False)
    for i, name in enumerate(("e1", "e2")):
        logits = states[0][0] @ weights[f"stitches.0.gates.{name}.weight"].T
        torch.testing.assert_close(hie[i], (1 / (1 + torch.exp(-logits))).mean(-1).detach())

    (eih,) = record.layers[1]
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
    assert [tuple(gates.shape) for gates in record.layers[0]] == [(3, 6, 2), (3, 3, 1)]


def test_blocks_nest() -> None:
    model = random_model(config_of(num_stitch_layers=1))
    with record_gates(model) as outer:
        with record_gates(model) as inner:
            run(model, TOKENS)
        run(model, TOKENS[:, :2])
    assert [len(gates[0]) for gates in outer.layers[0]] == [6, 2]
    assert [len(gates[0]) for gates in inner.layers[0]] == [6]


def test_an_error_inside_ends_the_recording() -> None:
    model = random_model(config_of(num_stitch_layers=1))
    with record_gates(model) as outer:
        with pytest.raises(IndexError), record_gates(model) as inner:
            run(model, TOKENS + 1)  # token 31 of 31
        run(model, TOKENS)
    run(model, TOKENS)
    assert not inner.layers
    assert len(outer.layers[0]) == 1


def test_recording_changes_nothing() -> None:
    model = random_model(config_of(num_stitch_layers=3))
    plain = run(model, TOKENS)
    with record_gates(model):
        assert torch.equal(run(model, TOKENS), plain)
