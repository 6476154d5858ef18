"""The backend of Transformer Engine: without FP8 it is the torch backend, number by number and name by name.

With FP8 it differs by rounding. E4M3 has 3 bits after the point: a rounded number is off by up to 2^-4, and by
2^-4 / sqrt(6) = 2.6% in the root mean square over the numbers between two powers of 2. A product of two such matrices
is then off by sqrt(2) 2.6% = 3.7%, and a state that took in n of them one after the other by about sqrt(n) 3.7%.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.bts.model import BTSModel
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError, UserError
from megabts.model.attention import make_context
from megabts.model.backend import Recompute
from megabts.model.decoder import Decoder, sequence_loss
from megabts.model.te_backend import TEBackend
from megabts.model.te_fp8 import FP8, fp8_state, load_fp8_state
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import Axis, ParallelMesh
from megabts.parallel.sharding import ParamMeta, initialise, named_metas
from megabts.runtime import device as runtime
from tests.model.models import SIZES, VARIANTS, batch, decoder, distance, gradients
from tests.te import fp8
from tests.te.library import LIBRARIES, Library, opened
from tests.te.standin import installed

FP8_SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "ffn_size": 96, "num_layers": 3}
NOISE = 0.037
"""Of one product in FP8."""


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    with opened(request.param) as library:
        yield library


def pair(library: Library, recompute: Recompute = "none", **sizes: Any) -> tuple[Decoder, Decoder]:
    """One model of the te and one of the torch backend."""
    make = partial(decoder, dtype=library.dtype, device=library.device, recompute=recompute, **sizes)
    return make(library=TEBackend), make()


def text(library: Library) -> tuple[Tensor, Tensor, Tensor]:
    tokens, labels, mask = (x.to(library.device) for x in batch())
    return tokens, labels, mask


def assert_alike(found: Decoder, expected: Decoder, library: Library, **keywords: Any) -> None:
    """Loss and every gradient."""
    loss, grads = gradients(found, *text(library), **keywords)
    true_loss, true_grads = gradients(expected, *text(library), **keywords)
    assert distance(loss, true_loss) < library.tolerance
    assert grads.keys() == true_grads.keys()
    for name, grad in true_grads.items():
        assert distance(grads[name], grad) < library.tolerance, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_torch_backend(variant: str, library: Library) -> None:
    found, expected = pair(library, **VARIANTS[variant])
    assert [(name, p.shape, p.dtype, meta) for name, p, meta in found.own_parameters()] == [
        (name, p.shape, p.dtype, meta) for name, p, meta in expected.own_parameters()
    ]
    assert_alike(found, expected, library)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: Recompute, library: Library) -> None:
    assert_alike(*pair(library, recompute, qk_norm=True), library)


def test_names_do_not_depend_on_recomputation(library: Library) -> None:
    found, _ = pair(library, "selective")
    assert [name for name, _, _ in found.own_parameters()] == [name for name, _, _ in decoder().own_parameters()]


def test_packed_documents_are_kept_apart(library: Library) -> None:
    ids = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [1] * 4], device=library.device)
    assert_alike(*pair(library, cross_document_attention=False), library, document_ids=ids)


class ListCache:
    """Keys and values of each layer in a list."""

    def __init__(self, num_layers: int) -> None:
        self.held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.held[layer].append((key, value))
        keys, values = zip(*self.held[layer])
        return torch.cat(keys), torch.cat(values)


def test_decoding_with_a_cache_is_the_whole_forward_pass(library: Library) -> None:
    """A prompt of 7, then 5 more at once, then one by one."""
    model, expected = pair(library, num_kv_heads=2)
    tokens, cache, found = text(library)[0], ListCache(3), []
    with torch.no_grad():
        for first, last in ((0, 7), (7, 12), *((i, i + 1) for i in range(12, 24))):
            context = make_context(model.config, torch.arange(first, last, device=library.device), library.dtype)
            hidden = model.run_layers(0, 3, model.embed(tokens[:, first:last]), context, [cache])
            found.append(model.logits(hidden))
        context = make_context(model.config, torch.arange(24, device=library.device), library.dtype)
        whole = expected.logits(expected.run_layers(0, 3, expected.embed(tokens), context))
    assert distance(torch.cat(found, 1), whole) < library.tolerance


def bts_model(
    backend: TorchBackend, mesh: ParallelMesh | None = None, recompute: Recompute = "none", **sizes: Any
) -> BTSModel:
    """A hub and two experts, four stitches; the first stitch follows layer 1."""
    mesh = mesh or ParallelMesh()
    bts = BTSConfig("hub", {"a": "a", "b": "b"}, gate_dropout=0.0, num_stitch_layers=4)
    model = BTSModel(ModelConfig(**{**SIZES, "num_layers": 4, **sizes}), bts, backend, recompute=recompute)
    initialise(named_metas(model), 1, mesh)
    with torch.no_grad():
        for name, parameter, meta in model.own_parameters():
            noise = torch.randn(meta.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.add_(0.1 * meta.shard(noise, mesh.tp).to(parameter.device))
    return model


def bts_gradients(model: BTSModel, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = sequence_loss(model, *(x.to(device) for x in batch()))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_stitches_train_and_members_do_not(library: Library) -> None:
    found, expected = (bts_model(kind(library.dtype, library.device, Axis("tp"))) for kind in (TEBackend, TorchBackend))
    assert [n for n, _, _ in named_metas(found)] == [n for n, _, _ in named_metas(expected)]
    loss, grads = bts_gradients(found, library.device)
    true_loss, true_grads = bts_gradients(expected, library.device)
    assert distance(loss, true_loss) < library.tolerance
    assert grads.keys() == true_grads.keys() == {name for name, _, _ in found.own_parameters()}
    for name, grad in true_grads.items():
        assert distance(grads[name], grad) < library.tolerance, name


def in_fp8(library: Library, kind: FP8, recompute: Recompute = "none", **sizes: Any) -> Decoder:
    """A decoder in FP8, computing in bfloat16 on GPUs."""
    dtype = torch.bfloat16 if library.device == "cuda" else torch.float32
    make = partial(TEBackend, fp8=kind)
    return decoder(library=make, dtype=dtype, device=library.device, recompute=recompute, **{**FP8_SIZES, **sizes})


def logits_of(model: Decoder, library: Library) -> Tensor:
    context = make_context(model.config, torch.arange(24, device=library.device), model.dtype)
    with torch.no_grad():
        hidden = model.run_layers(0, model.config.num_layers, model.embed(text(library)[0]), context)
        return model.logits(hidden).double()


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the root mean square."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", ["current", "block"])
def test_a_product_in_fp8_is_off_by_its_rounding(kind: FP8, library: Library) -> None:
    dtype = torch.bfloat16 if library.device == "cuda" else torch.float32
    backend = TEBackend(dtype, library.device, Axis("tp"), fp8=kind)
    linear = backend.column_linear(ParamMeta((512, 256), dim=0))
    x = torch.randn(64, 2, 256, generator=torch.Generator().manual_seed(1)).to(library.device, dtype)
    with torch.no_grad():
        exact = linear(x)
        with backend.forward_context(128):
            found = linear(x)
    assert 0.8 * NOISE < relative(found.double(), exact.double()) < 1.2 * NOISE


@pytest.mark.parametrize("kind", ["current", "delayed", "block"])
def test_fp8_is_off_by_the_rounding_of_its_products(kind: FP8, library: Library) -> None:
    """12 products one after the other; the weights are small, so that no softmax or gate makes more of a change.

    Logits are off by less than sqrt(12) of one's noise, and by more than a tenth of one's. The cross-entropy of a
    position changes by a weighted sum of the changes of its logits, the weights' squares summing to less than 2; the
    mean over positions by no more: below sqrt(2) of the changes' root mean square.
    """
    model = in_fp8(library, kind, init_std=0.05)
    exact = decoder(dtype=model.dtype, device=library.device, **{**FP8_SIZES, "init_std": 0.05})
    if kind == "delayed":  # scales come from earlier passes
        sequence_loss(model, *text(library)).backward()
    found, expected = logits_of(model, library), logits_of(exact, library)
    assert NOISE / 10 < relative(found, expected) < 12**0.5 * NOISE
    positions = text(library)[2].sum()
    change = (sequence_loss(model, *text(library)) - sequence_loss(exact, *text(library))).abs() / positions
    assert 0 < change < 2**0.5 * (found - expected).square().mean().sqrt()


@pytest.mark.parametrize("kind", ["current", "delayed"])
def test_fp8_computes_again_what_it_computed(kind: FP8, library: Library) -> None:
    """With recomputation the same numbers, step after step: the second time has the first one's scales."""
    plain, again = (in_fp8(library, kind, recompute) for recompute in ("none", "full"))
    for _ in range(3):
        (loss, grads), (loss_again, grads_again) = (gradients(model, *text(library)) for model in (plain, again))
        assert torch.equal(loss, loss_again)
        for name, grad in grads.items():
            assert torch.equal(grads_again[name], grad), name


def losses(model: Decoder, steps: int, library: Library) -> list[float]:
    found = []
    for _ in range(steps):
        loss, grads = gradients(model, *text(library))
        found.append(loss.item())
        with torch.no_grad():
            for name, parameter, _ in model.own_parameters():
                parameter.sub_(grads[name], alpha=1e-2)
    return found


def test_the_state_of_delayed_scaling_is_all_there_is(library: Library) -> None:
    """Weights and state of step 2 in a new model go on like the first, to the last bit; without the state not."""
    whole = losses(in_fp8(library, "delayed"), 5, library)
    first, second, third = (in_fp8(library, "delayed") for _ in range(3))
    assert losses(first, 2, library) == whole[:2]
    state = {name: tensor.clone() for name, tensor in fp8_state(first).items()}
    shapes = {name.removeprefix("fp8.layers.1."): tuple(t.shape) for name, t in state.items() if "layers.1." in name}
    assert shapes["attention.qkv.forward.scale"] == (3,)
    assert shapes["mlp.forward.amax_history"] == (1024, 6)
    assert shapes["mlp.backward.scale"] == (4,)
    assert len(state) == 3 * 3 * 4
    for model in (second, third):
        model.load_state_dict(first.state_dict())
    load_fp8_state(second, state, "a checkpoint")
    assert losses(second, 3, library) == whole[2:]
    assert losses(third, 3, library) != whole[2:]


def test_state_that_does_not_fit_is_refused(library: Library) -> None:
    state = {"fp8.layers.7.mlp.forward.scale": torch.ones(6)}
    with pytest.raises(UserError, match=r"a checkpoint does not fit the model: it has fp8\.layers\.7\.mlp"):
        load_fp8_state(in_fp8(library, "delayed"), state, "a checkpoint")
    module = "fp8.layers.1.mlp.forward."
    state = {f"{module}amax_history": torch.zeros(8, 6), f"{module}scale": torch.ones(3)}
    with pytest.raises(UserError, match=r"fp8.layers.1.mlp.forward.scale has shape \(3,\)"):
        load_fp8_state(in_fp8(library, "delayed"), state, "a checkpoint")


def test_there_is_no_state_without_delayed_scaling(library: Library) -> None:
    model = in_fp8(library, "current")
    losses(model, 1, library)
    assert fp8_state(model) == {}


def test_frozen_members_are_rounded_when_loaded_and_never_again() -> None:
    with installed():
        model = bts_model(TEBackend(torch.float32, "cpu", Axis("tp"), fp8="current"), **{**FP8_SIZES, "num_layers": 4})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(2):
            _, grads = bts_gradients(model, "cpu")
        assert grads.keys() == {name for name, _, _ in model.own_parameters()}
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        inner = {name: m.inner[0] for name, m in model.named_modules() if hasattr(m, "inner")}
        roundings = {name: m.weight_roundings for name, m in inner.items() if isinstance(m, fp8.FP8Module)}
        assert {n for n, count in roundings.items() if count == 0} == {n for n in roundings if n.startswith("members.")}
        assert {count for n, count in roundings.items() if n.startswith("stitches.")} == {2}
        weights = [p for n, p in model.members.named_parameters() if isinstance(p, fp8.QuantisedWeight)]
        assert len(weights) == 3 * 4 * 4
        assert {weight.num_roundings for weight in weights} == {1}


def test_members_stay_in_their_dtype_where_scaling_is_delayed(library: Library) -> None:
    assert not TEBackend(library.dtype, library.device, Axis("tp"), fp8="delayed").frozen().quantised
    assert TEBackend(library.dtype, library.device, Axis("tp"), fp8="current").frozen().quantised


def test_rows_that_fp8_cannot_take_are_refused_in_training_alone(library: Library) -> None:
    model = in_fp8(library, "current")
    tokens, labels, mask = (x[:, :21] for x in text(library))
    with pytest.raises(UsageError, match=r"fp8 current needs micro-batches of a multiple of 16 tokens .* have 42"):
        sequence_loss(model, tokens, labels, mask)
    exact = decoder(dtype=model.dtype, device=library.device, **FP8_SIZES)
    with torch.no_grad():
        found, expected = (sequence_loss(m, tokens, labels, mask) for m in (model, exact))
    assert distance(found, expected) < (1e-2 if model.dtype == torch.bfloat16 else 1e-6)


def test_a_missing_transformer_engine_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "have_te", lambda: False)
    with pytest.raises(UserError, match="not installed: pip install --no-build-isolation 'transformer-engine") as error:
        TEBackend(torch.float32, "cpu", Axis("tp"))
    assert "\n" not in str(error.value)


def test_one_that_does_not_load_is_said_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError(f"libcudnn.so.9: cannot open\n{name}")

    monkeypatch.setattr(runtime, "have_te", lambda: True)
    monkeypatch.setattr(runtime.importlib, "import_module", fails)
    with pytest.raises(UserError, match=r"does not load \(libcudnn.so.9: cannot open\)"):
        TEBackend(torch.float32, "cpu", Axis("tp"))


def test_an_old_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed():
        monkeypatch.delattr(sys.modules["transformer_engine.pytorch"], "autocast")
        with pytest.raises(UserError, match=r"older than 2\.12"):
            TEBackend(torch.float32, "cpu", Axis("tp"))
