"""The worked BTS cases in tests/golden/bts, made from the paper's equations over transformers' own layers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megabts.bts.build import load_member
from megabts.bts.model import BTSModel
from megabts.build import full_shapes, whole_model
from megabts.checkpoint.hf_config import config_from_hf
from megabts.config.methods import BTSConfig
from megabts.config.run import RunConfig
from megabts.model.attention import make_context
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh

GOLDEN = Path(__file__).parent.parent / "golden" / "bts"
TOLERANCE = 2e-5


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def golden_model(case: dict) -> BTSModel:
    """The case's model with its members' weights, in float32 on one rank."""
    mesh = ParallelMesh()
    folders = [GOLDEN / "members" / name for name in case["members"]]
    config = config_from_hf(folders[0])
    experts = {name: str(folder) for name, folder in zip(case["members"][1:], folders[1:], strict=True)}
    bts = BTSConfig(
        str(folders[0]),
        experts,
        case["num_stitch_layers"],
        alternating=case["alternating"],
        expert_stream=case["expert_stream"],
        gate_dropout=0.0,
    )
    model = BTSModel(config, bts, TorchBackend(torch.float32, "cpu", mesh.tp))
    whole = full_shapes(whole_model(RunConfig(model=config)))
    for name, folder in zip(bts.members, folders, strict=True):
        load_member(model, name, folder, whole, mesh)
    return model


def our_name(key: str, members: list[str]) -> str:
    """stitch.J.proj.I.weight -> stitches.J.projections.NAME.weight, member 0 being the hub."""
    _, stitch, kind, member, _ = key.split(".")
    kind = {"proj": "projections", "gate": "gates"}[kind]
    return f"stitches.{stitch}.{kind}.{members[int(member)]}.weight"


@pytest.mark.parametrize("name", ["paper", "unchanged"])
def test_worked_case(name: str) -> None:
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    golden = load_file(GOLDEN / f"{name}.safetensors")
    model = golden_model(case)
    assert [(p.after, p.kind) for p in model.plan] == list(zip(case["after_layers"], case["kinds"], strict=True))
    members = ["hub", *case["members"][1:]]
    parameters = dict(model.named_parameters())
    unused = 0
    for key, value in golden.items():
        if key.startswith("stitch."):
            if our_name(key, members) in parameters:
                parameters[our_name(key, members)].data.copy_(value)
            else:
                unused += 1
                assert not golden[f"grad.{key}"].any()  # the hub slice of a Hub-into-Experts gate
    assert unused == case["kinds"].count("hub_into_experts")

    tokens = torch.tensor(case["tokens"])
    context = make_context(model.config, torch.arange(16), torch.float32)
    hidden = model.run_layers(0, model.config.num_layers, model.embed(tokens[:, :-1]), context)
    loss = model.loss(hidden, tokens[:, 1:], torch.ones(2, 16)) / 32
    loss.backward()

    assert relative_error(model.logits(hidden), golden["logits"]) < TOLERANCE
    assert abs(loss.item() - case["loss"]) < TOLERANCE * case["loss"]
    compared = 0
    for key, value in golden.items():
        if key.startswith("grad.") and our_name(key.removeprefix("grad."), members) in parameters:
            gradient = parameters[our_name(key.removeprefix("grad."), members)].grad
            assert gradient is not None, key
            assert relative_error(gradient, value) < TOLERANCE, key
            compared += 1
    assert compared == sum(p.requires_grad for p in model.parameters())
