"""AdamW on flat masters against torch.optim.AdamW; low precision, frozen parts, resume. Ranks: parallel/test_ddp.py."""

from collections.abc import Iterable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from megabts.config.run import OptimizerConfig
from megabts.errors import UserError
from megabts.model.decoder import Decoder, sequence_loss
from megabts.optimizer import adamw
from megabts.optimizer.adamw import MasterAdamW, freeze_unscaled, lr_scale
from megabts.optimizer.clip import clip_gradients
from megabts.parallel.ddp import GradientBuffer
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import ParamMeta
from megabts.runtime.adamw_kernel import choose_adamw
from tests.model.models import batch, decoder, distance
from tests.te.optimizers import FusedAdam

ONE = ParallelMesh()
STEPS = 5


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))
    return model.to(dtype)


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamMeta]]:
    return ((name, p, ParamMeta(tuple(p.shape))) for name, p in model.named_parameters())


def state(optimizer: MasterAdamW) -> dict[str, Tensor]:
    return {f"{kind}.{name}": values for kind, name, _, values in optimizer.shards()}


def gradient_of(model: nn.Module, step: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    (model(x).square().sum() * (step + 1)).backward()


def train(
    model: nn.Module, config: OptimizerConfig, steps: Iterable[int], optimizer: MasterAdamW | None = None
) -> MasterAdamW:
    optimizer = optimizer or MasterAdamW(named(model), config, ONE, bucket_elements=60)
    for step in steps:
        optimizer.gradients.zero()
        gradient_of(model, step)
        optimizer.step(rate(step))
    return optimizer


def rate(step: int) -> float:
    return 0.01 / (step + 1)


@pytest.fixture(params=["torch", "others"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose kernel steps: torch's, or the stand-in for Transformer Engine's and apex's."""
    if request.param == "others":
        fused = partial(FusedAdam, adam_w_mode=True)
        monkeypatch.setattr(adamw, "choose_adamw", lambda library, device, dtype: fused)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_ten_steps_equal_torch(dtype: torch.dtype, tolerance: float) -> None:
    """Its decay is of matrices only, its learning rates scaled by name."""
    config = OptimizerConfig(weight_decay=0.3, lr_scale={"3.*": 0.5})
    ours, theirs = small(dtype), small(dtype)
    train(ours, config, range(10))

    theirs_named = dict(theirs.named_parameters())
    groups = [
        {"params": [p], "weight_decay": 0.3 if p.dim() > 1 else 0.0, "scale": 0.5 if n.startswith("3.") else 1.0}
        for n, p in theirs_named.items()
    ]
    plain = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, foreach=False)
    for step in range(10):
        plain.zero_grad()
        gradient_of(theirs, step)
        for group in plain.param_groups:
            group["lr"] = rate(step) * group["scale"]
        plain.step()
    for name, parameter in ours.named_parameters():
        assert distance(parameter, theirs_named[name]) < tolerance, name


def test_only_matrices_decay() -> None:
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterAdamW(named(model), OptimizerConfig(weight_decay=0.5), ONE)
    optimizer.step(0.1)  # without gradients only decay moves anything
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if parameter.dim() > 1 else 1.0))


def test_updates_below_bfloat16_resolution_accumulate_in_the_masters() -> None:
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = MasterAdamW(named(model), OptimizerConfig(weight_decay=0.0), ONE)
    values = []
    for _ in range(100):  # each step moves by 1e-4; bfloat16 near 1 has steps of 4e-3
        optimizer.gradients.zero()
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(1e-4)
        values.append(model.weight[0, 0].item())
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.99, abs=0.003)
    torch.testing.assert_close(optimizer.master, torch.full((16,), 0.99), atol=1e-5, rtol=0)
    assert model.weight.dtype == torch.bfloat16


def test_gradients_of_low_precision_accumulate_in_float32() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    buffer = GradientBuffer([("weight", weight, ParamMeta((1,)))], ONE)
    for value in [256.0] + [1.0] * 8:  # in bfloat16 256 + 1 is 256
        (weight * value).sum().backward()
        assert weight.grad is None
    assert buffer.flat.tolist() == [264.0]
    buffer.zero()
    assert buffer.slots[0].grad.tolist() == [0.0]


def test_double_precision_stays_double() -> None:
    model = small(torch.float64)
    assert train(model, OptimizerConfig(), range(2)).master.dtype == torch.float64


def test_first_matching_pattern_scales() -> None:
    config = OptimizerConfig(lr_scale={"layers.0.*": 0.1, "layers.*": 0.5})
    names = ["layers.0.mlp", "layers.1.mlp", "head"]
    assert [lr_scale(name, config) for name in names] == [0.1, 0.5, 1.0]


def test_scale_zero_freezes() -> None:
    model, config = small(), OptimizerConfig(lr_scale={"0.*": 0, "2.bias": 0})
    freeze_unscaled(model, config, dict(model.named_parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train(model, config, range(3))
    frozen = {"0.weight", "0.bias", "2.bias"}
    assert set(optimizer.names) == before.keys() - frozen
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == frozen


def test_a_pattern_without_a_parameter_is_refused() -> None:
    with pytest.raises(UserError, match=r"pattern 'hed\.\*' matches no parameter; names are like body\.weight"):
        freeze_unscaled(small(), OptimizerConfig(lr_scale={"hed.*": 0.1}), ["body.weight", "head.weight"])


def test_nothing_to_train_is_not_an_error() -> None:
    model = small().requires_grad_(False)
    optimizer = MasterAdamW(named(model), OptimizerConfig(), ONE)
    optimizer.step(0.1)
    optimizer.restored(1)
    assert optimizer.names == []
    assert state(optimizer) == {}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_training_is_bit_equal(dtype: torch.dtype) -> None:
    config = OptimizerConfig(lr_scale={"3.*": 0.5})
    whole = small(dtype)
    expected = state(train(whole, config, range(6)))

    first, second = small(dtype), small(dtype)
    saved = {name: x.clone() for name, x in state(train(first, config, range(3))).items()}
    assert set(saved) == {f"{k}.{n}" for k in ("master", "exp_avg", "exp_avg_sq") for n, _ in first.named_parameters()}
    optimizer = train(second, config, range(1))  # another state, to be forgotten
    for name, values in state(optimizer).items():
        values.copy_(saved[name])
    optimizer.restored(3)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))

    train(second, config, range(3, 6), optimizer)
    assert all(torch.equal(x, expected[name]) for name, x in state(optimizer).items())
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_that_is_chosen_on_a_gpu_equals_torchs() -> None:
    """Over flat slices with moments that are handed in, from a third step on: what `MasterAdamW` asks of it."""
    found = []
    for library in ("auto", "torch"):
        make = choose_adamw(library, torch.device("cuda"), torch.float32)  # type: ignore[arg-type]
        torch.manual_seed(0)
        flat, m, v = (torch.randn(3, 999, device="cuda") for _ in range(3))
        slices = [nn.Parameter(flat[row, 5:]) for row in range(3)]
        optimizer = make([{"params": slices, "weight_decay": 0.1, "lr": 0.01, "step": 2}], betas=(0.9, 0.95), eps=1e-8)
        for row, part in enumerate(slices):
            step = torch.tensor(2.0, device="cuda")
            optimizer.state[part] = {"step": step, "exp_avg": m[row, 5:], "exp_avg_sq": v.abs_()[row, 5:]}
        for _ in range(3):
            for part in slices:
                part.grad = torch.randn_like(part)
            optimizer.step()
        found.append((flat, m, v))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def train_decoder(micro_batches: int) -> dict[str, Tensor]:
    """The parameters after STEPS steps on 8 samples a step, in micro-batches."""
    model: Decoder = decoder()
    optimizer = MasterAdamW(model.own_parameters(), OptimizerConfig(eps=1e-4), ONE, bucket_elements=5000)
    for _ in range(STEPS):
        tokens, labels, mask = batch(size=8)
        optimizer.gradients.zero()
        for part in zip(*(x.chunk(micro_batches) for x in (tokens, labels, mask))):
            sequence_loss(model, *part).backward()
        optimizer.gradients.sync()
        optimizer.gradients.divide(mask.sum().item())
        clip_gradients(optimizer.gradients, 1.0)
        optimizer.step(0.01)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_accumulated_micro_batches_equal_one_batch() -> None:
    expected = train_decoder(1)
    for micro_batches in (2, 8):
        for name, parameter in train_decoder(micro_batches).items():
            assert distance(parameter, expected[name]) < 2e-6, name
