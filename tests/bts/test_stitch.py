"""One stitch layer: the starts in closed form, gate dropout, which parameters there are."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.bts.mixing import experts_into_hub, gate_dropout, hub_into_experts
from megabts.bts.plan import Kind
from megabts.bts.stitch import Stitch
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas
from tests.bts.reference import config_of

D = 8
EIH: Kind = "experts_into_hub"
HIE: Kind = "hub_into_experts"


def new(kind: Kind, experts: int = 3, **settings: Any) -> Stitch:
    """A stitch layer at its start."""
    mesh = ParallelMesh()
    stitch = Stitch(kind, D, config_of(experts, **settings), TorchBackend(torch.float32, "cpu", mesh.tp))
    initialise(named_metas(stitch), 0, mesh)
    return stitch


def run(stitch: Stitch, h: list[Tensor], seeds: list[int] | None = None) -> tuple[list[Tensor], Tensor]:
    """States and stacked gates."""
    after, gates = stitch(h, seeds)
    return after, torch.stack(gates)


def states(members: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 2, D, generator=generator) for _ in range(members)]


def test_equations_dimension_by_dimension() -> None:
    h = states()
    gates = torch.rand(4, 5, 2, D, generator=torch.Generator().manual_seed(2))
    hub, expert = experts_into_hub(h[0], h[1:], gates), hub_into_experts(h[1], h[0], gates[0])
    for t in range(5):
        for b in range(2):
            for d in range(D):
                place = (t, b, d)
                mix = sum(gates[i][place].item() * h[i][place].item() for i in range(4))
                assert hub[place].item() == pytest.approx(mix, rel=1e-5, abs=1e-6)
                g = gates[0][place].item()
                expected = (1 - g) * h[1][place].item() + g * h[0][place].item()
                assert expert[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_uniform_start() -> None:
    h = states()
    (hub, *experts), gates = run(new(EIH), h)
    torch.testing.assert_close(gates, torch.full((4, 5, 2, D), 0.25))
    torch.testing.assert_close(hub, sum(h) / 4)
    assert all(torch.equal(after, before) for after, before in zip(experts, h[1:], strict=True))
    (hub, *experts), gates = run(new(HIE), h)
    torch.testing.assert_close(gates, torch.full((3, 5, 2, D), 0.5))
    assert hub is h[0]
    for after, before in zip(experts, h[1:], strict=True):
        torch.testing.assert_close(after, (before + h[0]) / 2)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("bias", [0.0, 3.0, 5.5])
def test_hub_leaning_start(experts: int, bias: float) -> None:
    _, gates = run(new(EIH, experts, start="hub_leaning", hub_bias=bias), states(experts + 1))
    share = math.exp(bias) / (math.exp(bias) + experts)
    torch.testing.assert_close(gates[0], torch.full((5, 2, D), share))
    torch.testing.assert_close(gates[1:], torch.full((experts, 5, 2, D), (1 - share) / experts))


def test_hub_preserving_start() -> None:
    h = states()
    stitch = new(EIH, start="hub_preserving")
    (hub, *_), _ = stitch(h)
    assert torch.equal(hub, h[0])
    assert stitch.mix is not None
    stitch.mix.data.fill_(1.0)
    torch.testing.assert_close(stitch(h)[0][0], sum(h) / 4)
    stitch.mix.data.fill_(0.4)  # the gates returned are the weights that members really have
    (hub, *_), gates = run(stitch, h)
    torch.testing.assert_close(gates[:, 0, 0, 0], torch.tensor([0.7, 0.1, 0.1, 0.1]))
    torch.testing.assert_close(hub, sum(gate * state for gate, state in zip(gates, h, strict=True)))


def test_last_stitch_gives_the_hub_alone() -> None:
    h = states()
    only, gates = new(EIH)(h, last=True)
    assert len(only) == 1
    assert len(gates) == 4


@pytest.mark.parametrize(
    "kind, start, extra",
    [
        (EIH, "uniform", set()),
        (EIH, "hub_leaning", {"hub_bias"}),
        (EIH, "hub_preserving", {"mix"}),
        (HIE, "mix", set()),
    ],
)
def test_parameters(kind: Kind, start: str, extra: set[str]) -> None:
    """n projections, n or n + 1 gate slices of D x D, no biases; the two other starts add one vector."""
    named = dict(new(kind, 2, start="hub_leaning" if start == "mix" else start).named_parameters())
    gated = ["hub", "e1", "e2"] if kind == EIH else ["e1", "e2"]
    matrices = {f"projections.{name}.weight" for name in ("e1", "e2")} | {f"gates.{name}.weight" for name in gated}
    assert named.keys() == matrices | extra
    assert all(named[name].shape == (D, D) for name in matrices)
    assert all(named[name].shape == (D,) for name in extra)


def test_dropout_mask_depends_on_each_samples_seed_alone() -> None:
    logits = states(2)
    first = gate_dropout(logits[0], 0.3, [7, 8])
    torch.manual_seed(123)
    assert torch.equal(gate_dropout(logits[0], 0.3, [7, 8]), first)
    assert torch.equal(gate_dropout(logits[1], 0.3, [7, 8]) == 0, first == 0)
    assert not torch.equal(gate_dropout(logits[0], 0.3, [9, 8]) == 0, first == 0)
    alone = gate_dropout(logits[0][:, 1:], 0.3, [8])  # the same sample in another micro-batch
    assert torch.equal(alone, first[:, 1:])
    before = torch.random.get_rng_state()
    gate_dropout(logits[0], 0.3, [7, 8])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_expectation(dtype: torch.dtype) -> None:
    ones = torch.ones(1000, 2, 100, dtype=dtype)
    dropped = gate_dropout(ones, 0.2, [3, 4]).float()
    torch.testing.assert_close(dropped[dropped != 0], torch.full((int((dropped != 0).sum()),), 1.25))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)


def test_no_dropout() -> None:
    logits = states(1)[0]
    assert gate_dropout(logits, 0.5, None) is logits
    assert gate_dropout(logits, 0.0, [7, 8]) is logits


@pytest.mark.parametrize("kind", [EIH, HIE])
def test_dropout_falls_on_gate_logits_only_in_training(kind: Kind) -> None:
    h = states()
    stitch = new(kind, gate_dropout=0.5)
    for parameter in stitch.gates.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
    plain = run(stitch.eval(), h, [7, 7])[1]
    assert torch.equal(plain, run(stitch, h, [8, 8])[1])
    train = run(stitch.train(), h, [7, 7])[1]
    assert torch.equal(train, run(stitch, h, [7, 7])[1])
    assert torch.equal(run(stitch, h)[1], plain)  # no seed: no dropout
    assert not torch.equal(train, plain)
    if kind == HIE:  # a dropped logit is a gate of one half, a kept one doubles
        logits = torch.logit(plain)
        dropped = train == 0.5
        assert 0.4 < dropped.float().mean() < 0.6
        torch.testing.assert_close(train[~dropped], (2 * logits).sigmoid()[~dropped])
        assert not torch.equal(dropped[0], dropped[1])


def test_hub_bias_is_not_dropped() -> None:
    stitch = new(EIH, 1, gate_dropout=0.9, start="hub_leaning", hub_bias=2.0)
    gates = run(stitch.train(), states(2), [5, 6])[1]
    torch.testing.assert_close(gates[0], torch.full((5, 2, D), math.exp(2) / (math.exp(2) + 1)))


def test_a_members_mask_does_not_depend_on_the_other_members() -> None:
    """Removing an expert leaves the others' masks; so does adding one."""
    h, small, large = states(4), new(HIE, 2, gate_dropout=0.5), new(HIE, 3, gate_dropout=0.5)
    for stitch in (small, large):
        for name in ("e1", "e2"):
            stitch.gates[name].load_state_dict({"weight": torch.eye(D)})
    assert torch.equal(run(small.train(), h[:3], [9, 9])[1], run(large.train(), h, [9, 9])[1][:2])


def test_a_trainable_slice_of_one_expert_gives_no_gradient_to_the_others() -> None:
    stitch = new(HIE, 3)
    for name, parameter in stitch.named_parameters():
        parameter.requires_grad_(".e3." in name)
    after, _ = stitch(states())
    assert [state.requires_grad for state in after] == [False, False, False, True]
