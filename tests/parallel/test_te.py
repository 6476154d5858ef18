"""The te backend over tensor-parallel ranks against the torch backend on one: loss and every gradient, and FP8.

On ranks over gloo, so with the stand-in for Transformer Engine, whose collectives are its own.
"""

from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megabts.config.run import ParallelConfig
from megabts.model.backend import Recompute
from megabts.model.decoder import Decoder
from megabts.model.te_backend import TEBackend
from megabts.model.te_fp8 import FP8, amax_group, fp8_state, load_fp8_state
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import Axis, ParallelMesh, build_mesh
from megabts.runtime.device import collective_timeout
from tests.model.models import VARIANTS, batch, decoder, distance, gradients
from tests.model.test_te_backend import FP8_SIZES, NOISE, bts_gradients, bts_model
from tests.parallel.test_tensor import whole_gradient
from tests.ranks import run_ranks
from tests.te.standin import installed

CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {name: VARIANTS[name] for name in ("gqa", "mqa", "bias", "qk-norm")},
    4: {"one kv head": {"num_kv_heads": 1, "qk_norm": True}, "bias": {"qkv_bias": True, "tie_embeddings": True}},
}
FP8_CASES: tuple[tuple[FP8, bool], ...] = (("current", False), ("current", True), ("delayed", True))
Found = tuple[Tensor, dict[str, Tensor]]
FP8Found = dict[tuple[FP8, bool], tuple[list[Found], dict[str, Tensor], dict[str, Tensor]]]


def split_decoders(rank: int, size: int) -> dict[tuple[str, bool], Found]:
    """Loss and this rank's gradients of every case, with whole and with split sequences."""
    mesh = build_mesh(ParallelConfig(tensor=size), size, rank)
    found = {}
    with installed():
        for name, sizes in CASES[size].items():
            for sequence in (False, True):
                recompute: Recompute = "full" if name == "gqa" else "selective" if name == "bias" else "none"
                model = decoder(mesh, sequence=sequence, recompute=recompute, library=TEBackend, **sizes)
                assert same_parameters(model, decoder(mesh, sequence=sequence, **sizes))
                found[name, sequence] = gradients(model, *batch())
    return found


def split_bts(rank: int) -> dict[bool, Found]:
    """Loss and this rank's gradients of a BTS model, whose stitches enter the tensor-parallel region themselves."""
    mesh = build_mesh(ParallelConfig(tensor=2), 2, rank)
    with installed():
        return {
            sequence: bts_gradients(bts_model(TEBackend(torch.float32, "cpu", mesh.tp, sequence), mesh), "cpu")
            for sequence in (False, True)
        }


def on_two_ranks(rank: int) -> dict[str, Any]:
    return {"dense": split_decoders(rank, 2), "bts": split_bts(rank), "fp8": split_fp8(rank)}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks)


def test_stitches_on_two_ranks_equal_one(two_ranks: list[dict[str, Any]]) -> None:
    ranks = [found["bts"] for found in two_ranks]
    for sequence in (False, True):
        one = bts_model(TorchBackend(torch.float32, "cpu", Axis("tp"), sequence))
        true_loss, grads = bts_gradients(one, "cpu")
        torch.testing.assert_close(ranks[0][sequence][0], true_loss)
        assert ranks[0][sequence][1].keys() == grads.keys() == {name for name, _, _ in one.own_parameters()}
        for name, _, meta in one.own_parameters():
            found = whole_gradient(meta, [rank[sequence][1][name] for rank in ranks])
            assert distance(found, grads[name]) < 1e-5, (sequence, name)


def same_parameters(found: Decoder, expected: Decoder) -> bool:
    """Names, shapes and records of the torch backend's."""
    ours, theirs = ([(n, p.shape, meta) for n, p, meta in model.own_parameters()] for model in (found, expected))
    return ours == theirs


def check_split_decoders(ranks: list[dict[tuple[str, bool], Found]], size: int) -> None:
    for (case, sequence), (loss, _) in ranks[0].items():
        one = decoder(**CASES[size][case])
        true_loss, grads = gradients(one, *batch())
        torch.testing.assert_close(loss, true_loss)
        split = decoder(sequence=sequence, **CASES[size][case])  # for what its metas say of partial gradients
        for name, _, meta in split.own_parameters():
            found = whole_gradient(meta, [rank[case, sequence][1][name] for rank in ranks])
            assert distance(found, grads[name]) < 1e-5, (case, sequence, name)


def test_two_ranks_equal_one(two_ranks: list[dict[str, Any]]) -> None:
    check_split_decoders([found["dense"] for found in two_ranks], 2)


def test_four_ranks_equal_one() -> None:
    check_split_decoders(run_ranks(4, split_decoders, 4), 4)


def in_fp8(kind: FP8, mesh: ParallelMesh, sequence: bool = False, recompute: Recompute = "none") -> Decoder:
    group = amax_group(mesh, 60) if kind == "delayed" else None
    make = partial(TEBackend, fp8=kind, amax_group=group)
    return decoder(mesh, sequence=sequence, recompute=recompute, library=make, **{**FP8_SIZES, "init_std": 0.05})


def passes(model: Decoder, number: int) -> list[Found]:
    return [gradients(model, *batch(size=4)) for _ in range(number)]


def split_fp8(rank: int) -> FP8Found:
    """Four passes, their state after two and after four; a new model that starts in the middle ends alike.

    Layers are computed again in backward, which moves TE's histories on too.
    """
    mesh = build_mesh(ParallelConfig(tensor=2), 2, rank)
    found: FP8Found = {}
    for kind, sequence in FP8_CASES:
        with installed():
            model = in_fp8(kind, mesh, sequence, recompute="full")
            first = passes(model, 2)
            if kind == "current":
                found[kind, sequence] = (first, {}, {})
                continue
            state = {name: tensor.clone() for name, tensor in fp8_state(model).items()}
            then = passes(model, 2)
            end = {name: tensor.clone() for name, tensor in fp8_state(model).items()}
        with installed():
            again = in_fp8(kind, mesh, sequence, recompute="full")
            load_fp8_state(again, state, "a checkpoint")
            assert_equal(passes(again, 2), then)
            assert all(torch.equal(tensor, end[name]) for name, tensor in fp8_state(again).items())
            found[kind, sequence] = (first + then, state, end)
    return found


def assert_equal(found: list[Found], expected: list[Found]) -> None:
    for (loss, grads), (true_loss, true_grads) in zip(found, expected, strict=True):
        assert torch.equal(loss, true_loss)
        assert all(torch.equal(grads[name], grad) for name, grad in true_grads.items())


def test_fp8_on_two_ranks_is_fp8_on_one(two_ranks: list[dict[str, Any]]) -> None:
    """Loss within the noise of FP8 (12 products); delayed scaling's state the same on both ranks, and that of one."""
    ranks = [found["fp8"] for found in two_ranks]
    for kind, sequence in FP8_CASES:
        with installed():
            alone = in_fp8(kind, ParallelMesh())
            expected = passes(alone, 4)
            states = fp8_state(alone)
        exact = gradients(decoder(**{**FP8_SIZES, "init_std": 0.05}), *batch(size=4))[0]
        (runs, state, end), (_, other, other_end) = (rank[kind, sequence] for rank in ranks)
        for (loss, _), (one_loss, _) in zip(runs, expected):
            assert loss != exact
            assert abs(loss - one_loss) / one_loss < 12**0.5 * NOISE / 10
        assert state.keys() == other.keys() == (states.keys() if kind == "delayed" else set())
        assert all(torch.equal(other[name], tensor) for name, tensor in state.items())
        assert all(torch.equal(other_end[name], tensor) for name, tensor in end.items())
        for name, tensor in end.items():
            if name.endswith("forward.scale") and "layers.0.attention.qkv" in name:
                torch.testing.assert_close(tensor, states[name], rtol=0.0, atol=0.0)


def test_scales_are_shared_by_replicas_and_slices_of_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid is (pp, dp, ep, tp), tp fastest; every rank creates every group."""
    created: list[list[int]] = []

    def new_group(ranks: list[int], timeout: timedelta) -> list[int]:
        assert timeout == collective_timeout(10)
        created.append(ranks)
        return ranks

    monkeypatch.setattr(dist, "new_group", new_group)
    dp, tp = Axis("dp", 2, 1), Axis("tp", 2, 0)
    assert amax_group(ParallelMesh(pp=Axis("pp", 2, 1), dp=dp, tp=tp), 10) == [4, 5, 6, 7]  # type: ignore[comparison-overlap]
    assert created == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert amax_group(ParallelMesh(dp=dp, ep=Axis("ep", 2, 1), tp=tp), 10) == [2, 3, 6, 7]  # type: ignore[comparison-overlap]
    assert created[2:] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert amax_group(ParallelMesh(pp=Axis("pp", 2)), 10) is None
