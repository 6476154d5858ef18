"""The BTS model against nested loops: logits, loss and every stitch gradient; identity; what is frozen."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megabts.bts.model import BTSModel, member_of
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.config.run import OptimizerConfig
from megabts.errors import UsageError
from megabts.model.attention import make_context
from megabts.model.decoder import Decoder, sequence_loss
from megabts.model.torch_backend import TorchBackend
from megabts.optimizer.adamw import MasterAdamW
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas
from tests.bts.reference import SIZES, config_of, random_model, reference_logits, reference_loss, run

TOKENS = torch.tensor([[3, 7, 1, 30, 12, 4], [0, 29, 5, 5, 18, 2]])
LABELS = torch.tensor([[7, 1, 30, 12, 4, 9], [29, 5, 5, 18, 2, 11]])
MASK = torch.tensor([[1.0, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 0]])
EIH, HIE = True, False

CASES: dict[str, tuple[dict[str, Any], list[tuple[int, bool]]]] = {
    "K does not divide L": ({"num_stitch_layers": 2}, [(2, HIE), (5, EIH)]),
    "K = 3": ({"num_stitch_layers": 3}, [(1, EIH), (2, HIE), (5, EIH)]),
    "K = 1": ({"num_stitch_layers": 1}, [(5, EIH)]),
    "K = L": ({"num_stitch_layers": 5}, [(1, EIH), (2, HIE), (3, EIH), (4, HIE), (5, EIH)]),
    "Experts-into-Hub only": ({"num_stitch_layers": 2, "alternating": False}, [(2, EIH), (5, EIH)]),
    "placed late": ({"num_stitch_layers": 3, "placement": [3, 4, 5]}, [(3, EIH), (4, HIE), (5, EIH)]),
    "placed early": (
        {"num_stitch_layers": 4, "placement": [1, 2, 4, 5], "expert_stream": "unchanged"},
        [(1, HIE), (2, EIH), (4, HIE), (5, EIH)],
    ),
    "placed, Experts-into-Hub only": (
        {"num_stitch_layers": 2, "placement": [4, 5], "alternating": False},
        [(4, EIH), (5, EIH)],
    ),
    "unchanged": ({"num_stitch_layers": 3, "expert_stream": "unchanged"}, [(1, EIH), (2, HIE), (5, EIH)]),
    "n = 1": ({"experts": 1, "num_stitch_layers": 3}, [(1, EIH), (2, HIE), (5, EIH)]),
    "n = 3": ({"experts": 3, "num_stitch_layers": 2}, [(2, HIE), (5, EIH)]),
    "hub leaning": ({"num_stitch_layers": 3, "start": "hub_leaning"}, [(1, EIH), (2, HIE), (5, EIH)]),
    "mixture": ({"num_stitch_layers": 3, "output": "mixture"}, [(1, EIH), (2, HIE), (5, EIH)]),
    "mixture, evidence": (
        {"num_stitch_layers": 3, "output": "mixture", "evidence": 3, "expert_stream": "unchanged"},
        [(1, EIH), (2, HIE), (5, EIH)],
    ),
    "token gates": ({"num_stitch_layers": 3, "gate": "token"}, [(1, EIH), (2, HIE), (5, EIH)]),
    "normalised gate input": ({"num_stitch_layers": 2, "gate_input": "normalised"}, [(2, HIE), (5, EIH)]),
    "low rank": ({"num_stitch_layers": 3, "projection_rank": 3}, [(1, EIH), (2, HIE), (5, EIH)]),
    "hub preserving": ({"num_stitch_layers": 3, "start": "hub_preserving"}, [(1, EIH), (2, HIE), (5, EIH)]),
}


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def digests(parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    return {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in parameters.items()}


def of_members(model: BTSModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith("members.")}


def reference(
    model: BTSModel, plan: list[tuple[int, bool]], weights: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits, loss, stitch gradients) of the loops, in float64."""
    exact = {name: w.detach().double() for name, w in weights.items()}
    stitches = {name: w.requires_grad_() for name, w in exact.items() if not name.startswith("members.")}
    logits = reference_logits(model.config, model.bts, exact, TOKENS, plan)
    loss = reference_loss(logits, LABELS, MASK)
    gradients = torch.autograd.grad(loss, list(stitches.values()))
    return logits.detach(), loss.detach(), dict(zip(stitches, gradients, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_against_loops(case: str) -> None:
    settings, plan = CASES[case]
    model = random_model(config_of(**settings))
    logits, loss, gradients = reference(model, plan, dict(model.named_parameters()))
    hidden = run(model, TOKENS)
    assert hidden.shape == (model.num_members if model.mixes else 1, 6, 2, 16)
    context = make_context(model.config, torch.arange(6), model.dtype, tokens=TOKENS)
    assert relative_error(model.logits(hidden, context), logits) < 2e-5
    ours = model.loss(hidden, LABELS, MASK, context)
    assert abs(ours.item() / loss.item() - 1) < 2e-5
    ours.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, gradients[name]) < 2e-5, name


@pytest.mark.parametrize("case", ["K = 3", "placed late"])
def test_against_loops_in_double_precision(case: str) -> None:
    """The maths itself, not its rounding; what remains is the rotation's float32 angles."""
    settings, plan = CASES[case]
    model = random_model(config_of(**settings), torch.float64)
    logits, _, gradients = reference(model, plan, dict(model.named_parameters()))
    hidden = run(model, TOKENS)
    assert relative_error(model.logits(hidden), logits) < 2e-6
    model.loss(hidden, LABELS, MASK).backward()
    for name, parameter, _ in model.own_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradients[name]) < 2e-6, name


@pytest.mark.parametrize("case", ["K = 3", "mixture, evidence", "unchanged", "low rank"])
@pytest.mark.parametrize(
    ("dtype", "frozen", "bound"), [(torch.float64, torch.float32, 2e-5), (torch.float32, torch.bfloat16, 0.15)]
)
def test_members_in_another_dtype(case: str, dtype: torch.dtype, frozen: torch.dtype, bound: float) -> None:
    """As exact as the members' dtype; stitches and their gradients are in their own."""
    settings, plan = CASES[case]
    model = random_model(config_of(**settings), dtype, frozen=frozen)
    assert {parameter.dtype for parameter in of_members(model).values()} == {frozen}
    logits, loss, gradients = reference(model, plan, dict(model.named_parameters()))
    hidden = run(model, TOKENS)
    assert hidden.dtype == model.dtype == frozen
    context = make_context(model.config, torch.arange(6), model.dtype, tokens=TOKENS)
    assert relative_error(model.logits(hidden, context), logits) < bound
    ours = model.loss(hidden, LABELS, MASK, context)
    assert abs(ours.item() / loss.item() - 1) < bound / 10
    ours.backward()
    for name, parameter, _ in model.own_parameters():
        assert parameter.grad is not None
        assert parameter.dtype == parameter.grad.dtype == dtype
        assert relative_error(parameter.grad, gradients[name]) < bound, name


def test_an_expert_as_hub() -> None:
    """Hub and expert change places: the output is that of the loops with the roles exchanged, and another one."""
    settings, plan = CASES["n = 1"]
    model = random_model(config_of(**settings))
    before = model.logits(run(model, TOKENS))
    hub, expert = model.hub.state_dict(), model.members["e1"].state_dict()
    exchanged = {name: tensor.clone() for name, tensor in {**hub, **expert}.items()}
    model.members["e1"].load_state_dict({name: tensor.clone() for name, tensor in hub.items() if name in expert})
    model.hub.load_state_dict(exchanged)
    logits, _, _ = reference(model, plan, dict(model.named_parameters()))
    ours = model.logits(run(model, TOKENS))
    assert relative_error(ours, logits) < 2e-5
    assert relative_error(ours, before) > 1e-2


def test_layers_in_pieces_are_the_layers_at_once() -> None:
    model = random_model(config_of(num_stitch_layers=2))
    from_zero = run(model, TOKENS)
    hidden = model.embed(TOKENS)
    context = make_context(model.config, torch.arange(6), model.dtype)
    for depth in range(5):
        hidden = model.run_layers(depth, depth + 1, hidden, context)
    torch.testing.assert_close(hidden, from_zero, rtol=0, atol=0)


def dense_and_identical(stream: str, start: str) -> tuple[Decoder, BTSModel]:
    mesh = ParallelMesh()
    config = ModelConfig(**SIZES)
    backend = TorchBackend(torch.float32, "cpu", mesh.tp)
    dense = Decoder(config, backend)
    initialise(named_metas(dense), 5, mesh)
    bts = config_of(3, num_stitch_layers=3, expert_stream=stream, start=start)
    model = BTSModel(config, bts, backend)
    initialise(named_metas(model), 6, mesh)
    for member in model.members.values():
        member.load_state_dict(dense.state_dict(), strict=False)
    return dense, model


@pytest.mark.parametrize("stream", ["projected", "unchanged"])
@pytest.mark.parametrize("start", ["uniform", "hub_leaning", "hub_preserving"])
def test_identical_members_at_the_start_are_the_dense_model(stream: str, start: str) -> None:
    dense, model = dense_and_identical(stream, start)
    context = make_context(dense.config, torch.arange(6), torch.float32)
    expected = dense.logits(dense.run_layers(0, 5, dense.embed(TOKENS), context))
    assert relative_error(model.logits(run(model, TOKENS)), expected) < 1e-6


def test_hub_preserving_start_is_the_hub_exactly_and_can_leave_it() -> None:
    model = random_model(config_of(num_stitch_layers=3, start="hub_preserving"), shake=0.0)
    context = make_context(model.config, torch.arange(6), torch.float32)
    alone = model.hub.logits(model.hub.run_layers(0, 5, model.hub.embed(TOKENS), context))
    with torch.no_grad():
        assert (model.logits(run(model, TOKENS)) - alone).abs().max().item() == 0
    model.loss(run(model, TOKENS), LABELS, MASK).backward()
    mixes = [p for name, p, _ in model.own_parameters() if name.endswith(".mix")]
    assert len(mixes) == 2
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in mixes)


def train(model: BTSModel, steps: int = 20) -> list[float]:
    optimizer = MasterAdamW(model.own_parameters(), OptimizerConfig(), ParallelMesh())
    losses = []
    for step in range(steps):
        optimizer.gradients.zero()
        loss = sequence_loss(model, TOKENS, LABELS, MASK, dropout_seeds=[step] * len(TOKENS))
        loss.backward()
        optimizer.step(1e-2)
        losses.append(loss.item())
    return losses


def test_members_stay_as_they_are() -> None:
    model = random_model(config_of(num_stitch_layers=3, gate_dropout=0.1))
    members, before = of_members(model), digests(of_members(model))
    stitches = digests({name: p for name, p, _ in model.own_parameters()})
    losses = train(model)
    assert losses[-1] < 0.7 * losses[0]
    assert digests(members) == before
    assert all(p.grad is None and not p.requires_grad for p in members.values())
    after = digests({name: p for name, p, _ in model.own_parameters()})
    assert all(after[name] != stitches[name] for name in stitches)


@pytest.mark.parametrize("trainable", [["e2"], ["hub"], ["e1", "hub"]])
def test_only_the_named_slices_train(trainable: list[str]) -> None:
    model = random_model(config_of(num_stitch_layers=3, start="hub_leaning", trainable=trainable))
    own = {name: p for name, p, _ in model.own_parameters()}
    before = digests(own)
    train(model, 5)
    changed = {name for name, digest in digests(own).items() if digest != before[name]}
    owners = {"e1": ".e1.", "e2": ".e2."}
    expected = set()
    for name in own:
        owner = next((member for member, part in owners.items() if part in name), "hub")
        expected |= {name} if owner in trainable else set()
    assert changed == expected
    assert expected


def test_nothing_is_recorded_before_the_first_stitch() -> None:
    model = random_model(config_of(num_stitch_layers=2))
    seen: list[list[bool]] = []
    for stitch in model.stitches.values():
        stitch.register_forward_pre_hook(lambda _, args: seen.append([state.requires_grad for state in args[0]]))
    assert run(model, TOKENS).requires_grad
    assert seen == [[False, False, False], [False, True, True]]  # the first is Hub-into-Experts: the hub goes on as is


def test_frozen_linears_keep_no_input() -> None:
    """Downstream of a stitch, gradients pass through frozen linears; that takes their weights, not their inputs."""
    model = random_model(config_of(num_stitch_layers=5))
    inputs: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith((".qkv", ".gate_up", ".down")):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(run(model, TOKENS), LABELS, MASK)
    assert len(inputs) == 3 * 5 * 3
    assert any(tensor.requires_grad for tensor in inputs)
    stored = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert stored
    assert not stored & {tensor.untyped_storage().data_ptr() for tensor in inputs}


def test_experts_have_no_output_layers_and_the_checkpoint_holds_the_stitches() -> None:
    model = random_model(config_of(num_stitch_layers=2))
    assert not any(name.startswith(("members.e1.final_norm", "members.e1.head")) for name in of_members(model))
    assert "members.hub.head.weight" in of_members(model)
    own = {name for name, _, _ in model.own_parameters()}
    assert own == {name for name, _ in model.named_parameters()} - of_members(model).keys()
    assert {member_of(name) for name in own} == {"hub", "e1", "e2"}
    assert "stitches.0.gates.hub.weight" not in own  # Hub-into-Experts
    assert "stitches.1.gates.hub.weight" in own


@pytest.mark.parametrize("name", ["train", "keys", "training"])
def test_a_name_that_modules_use(name: str) -> None:
    with pytest.raises(UsageError, match=f"member named '{name}'"):
        random_model(BTSConfig("hub", {name: "dir"}, 1))


def test_more_stitch_layers_than_layers() -> None:
    with pytest.raises(UsageError, match="num_stitch_layers 6"):
        random_model(config_of(num_stitch_layers=6))
