"""Buckets, shards and ranks against torch's AdamW on one rank: parameters, norms, order of messages, memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megabts.parallel.ddp as ddp
from megabts.config.run import OptimizerConfig, ParallelConfig
from megabts.model.attention import make_context
from megabts.model.decoder import Decoder, sequence_loss
from megabts.model.part import Part
from megabts.optimizer.adamw import KINDS, MasterAdamW, lr_scale
from megabts.optimizer.clip import clip_gradients
from megabts.parallel.ddp import GradientBuffer
from megabts.parallel.mesh import Axis, ParallelMesh, build_mesh
from megabts.parallel.sharding import ParamMeta
from tests.model.models import batch, decoder, distance
from tests.ranks import run_ranks

WORLD, STEPS, LR = 4, 3, 0.01
CONFIG = OptimizerConfig(eps=1e-4, clip_grad=0.5, lr_scale={"layers.1.*": 0.5})
TIED = "embedding.weight"


@dataclass(frozen=True)
class Case:
    """A model on a mesh."""

    parallel: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    dtype: torch.dtype = torch.float64
    bucket: int = 3000


MQA = {"num_kv_heads": 1, "qk_norm": True, "qkv_bias": True}
CASES = {
    "dp4": Case(),
    "dp4, one bucket": Case(bucket=10**9),
    "dp4, a bucket for every parameter": Case(bucket=1, sizes={"hidden_size": 40}),
    "dp4 in float32": Case(dtype=torch.float32),
    "dp4, two micro-batches": Case(micro_batches=2),
    "dp4, tied": Case(sizes={"tie_embeddings": True}),
    "dp2 x tp2": Case({"tensor": 2}, MQA, 2),
    "dp2 x tp2 in float32": Case({"tensor": 2, "sequence": True}, MQA, dtype=torch.float32),
    "dp2 x tp2+sp": Case({"tensor": 2, "sequence": True}, MQA, 2),
    "tp4+sp, one kv head": Case({"tensor": 4, "sequence": True}, MQA),
    "tp4+sp, two kv heads": Case({"tensor": 4, "sequence": True}, {**MQA, "num_kv_heads": 2}),
    "pp2 x dp2, tied": Case({"pipeline": 2}, {"tie_embeddings": True}, 2),
    "pp2 x tp2+sp, tied": Case({"pipeline": 2, "tensor": 2, "sequence": True}, {"tie_embeddings": True, **MQA}),
    "pp4, tied": Case({"pipeline": 4}, {"tie_embeddings": True}, dtype=torch.float32),
}
PARTS = {
    2: [Part((range(0, 1),), True, False), Part((range(1, 3),), False, True)],
    4: [Part((range(i, j),), i == 0 == j, head) for i, j, head in ((0, 0, False), (0, 2, False), (2, 3, False))]
    + [Part((range(3, 3),), False, True)],
}


@dataclass
class Found:
    """What a rank has after the steps."""

    parameters: dict[str, Tensor]
    norms: list[float]
    events: list[tuple[str, int]]
    shards: list[tuple[str, str, tuple[int, int], Tensor]]
    num_buckets: int


def run(case: Case, mesh: ParallelMesh) -> Found:
    """STEPS steps of this rank's part of a decoder on its share of 8 samples."""
    part = PARTS[mesh.pp.size][mesh.pp.rank] if mesh.pp.size > 1 else None
    model = decoder(mesh, sequence=bool(case.parallel.get("sequence")), part=part, dtype=case.dtype, **case.sizes)
    tied = (TIED,) if "tie_embeddings" in case.sizes else ()
    optimizer = MasterAdamW(model.own_parameters(), CONFIG, mesh, bucket_elements=case.bucket, tied=tied)
    gradients, norms, share = optimizer.gradients, [], 8 // mesh.dp.size
    with spy(gradients) as events:
        for _ in range(STEPS):
            tokens, labels, mask = batch(size=8)
            mine = slice(mesh.dp.rank * share, (mesh.dp.rank + 1) * share)
            parts = list(zip(*(x[mine].chunk(case.micro_batches) for x in (tokens, labels, mask))))
            gradients.zero()
            for number, (tokens, labels, part_mask) in enumerate(parts, 1):
                events.append(("last backward" if number == len(parts) else "backward", number))
                if number < len(parts):
                    backward(model, mesh, tokens, labels, part_mask)
                else:
                    with gradients.overlap():
                        backward(model, mesh, tokens, labels, part_mask)
            events.append(("sync", 0))
            gradients.sync()
            gradients.divide(mask.sum().item())
            norms.append(clip_gradients(gradients, CONFIG.clip_grad))
            optimizer.step(LR)
    parameters = {name: p.detach() for name, p, _ in model.own_parameters()}
    return Found(parameters, norms, events, list(optimizer.shards()), len(gradients.buckets))


def backward(model: Decoder, mesh: ParallelMesh, tokens: Tensor, labels: Tensor, mask: Tensor) -> None:
    """Forward and backward of one micro-batch; with stages, one waits for the other."""
    pp = mesh.pp
    if pp.size == 1:
        sequence_loss(model, tokens, labels, mask).backward()
        return
    layers = model.part.chunks[0]
    if pp.rank == 0:
        received = hidden = model.embed(tokens)
    else:
        shape = model.wire_shape(layers.start, tokens.shape[1], len(tokens))
        received = hidden = torch.zeros(shape, dtype=model.dtype)
        dist.recv(hidden, pp.ranks[pp.rank - 1])
        hidden.requires_grad_()
    context = make_context(model.config, torch.arange(tokens.shape[1]), model.dtype)
    hidden = model.run_layers(layers.start, layers.stop, hidden, context)
    if pp.rank == pp.size - 1:
        model.loss(hidden, labels, mask).backward()
    else:
        dist.send(hidden.detach(), pp.ranks[pp.rank + 1])
        grad = torch.empty_like(hidden)
        dist.recv(grad, pp.ranks[pp.rank + 1])
        if hidden is not received or pp.rank == 0:
            hidden.backward(grad)
        else:
            received.grad = grad
    if pp.rank > 0:
        assert received.grad is not None
        dist.send(received.grad, pp.ranks[pp.rank - 1])


@contextmanager
def spy(gradients: GradientBuffer) -> Iterator[list[tuple[str, int]]]:
    """Inside the block, every bucket's reduce-scatter is noted as ("bucket", where it begins in the flat buffer)."""
    original, events = ddp.reduce_scatter_single, []

    def noted(output: Tensor, flat: Tensor, **keywords: Any) -> Any:
        events.append(("bucket", (flat.data_ptr() - gradients.flat.data_ptr()) // flat.element_size()))
        return original(output, flat, **keywords)

    setattr(ddp, "reduce_scatter_single", noted)  # noqa: B010
    try:
        yield events
    finally:
        setattr(ddp, "reduce_scatter_single", original)  # noqa: B010


class Toy(nn.Module):
    """Parameters of awkward sizes; the loss of a rank is sum(parameter * multiplier) over those it uses."""

    shapes = ((7,), (3, 5), (), (70, 10), (1,), (129,))

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(s, generator=generator).to(dtype) for s in self.shapes)

    def named(self) -> Iterator[tuple[str, nn.Parameter, ParamMeta]]:
        return ((name, p, ParamMeta(tuple(p.shape))) for name, p in self.named_parameters())

    def loss(self, rank: int, unused: dict[int, set[int]]) -> Tensor:
        used = [i for i in range(len(self.weights)) if i not in unused.get(rank, set())]
        if rank % 2:
            used = used[::-1]  # gradients come in another order
        total = torch.zeros((), dtype=self.weights[0].dtype)
        for i in used:
            total = total + (self.weights[i] * float(rank + i + 1)).sum()
        return total


UNUSED = {0: {2}, 1: {2, 3}, 3: {0, 2, 5}}
"""Parameter 2 has no gradient anywhere, others none on some ranks."""


def toys(mesh: ParallelMesh) -> dict[str, Any]:
    """Gradient sums, bfloat16, memory, what is not finite, ranks that train nothing."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        toy = Toy(dtype)
        optimizer = MasterAdamW(toy.named(), OptimizerConfig(), mesh, bucket_elements=40)
        for step in range(STEPS):
            optimizer.gradients.zero()
            with optimizer.gradients.overlap():
                toy.loss(mesh.dp.rank, UNUSED).backward()
            optimizer.gradients.sync()
            if step == 0:
                ranges = {
                    slot.name: slot.grad.view(-1)[slice(*slot.covered)].clone() for slot in optimizer.gradients.slots
                }
            optimizer.step(LR)
        parameters = {name: p.detach() for name, p in toy.named_parameters()}
        found[str(dtype)] = (parameters, list(optimizer.shards()), ranges)
    buffers = [optimizer.master, *optimizer.moments.values()]
    assert optimizer.adamw is not None
    extra = [x for s in optimizer.adamw.state.values() for x in s.values() if x.dim()]
    spans = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in buffers]
    assert all(any(a <= x.data_ptr() < b for a, b in spans) for x in extra if len(x))
    found["bytes"] = sum(b.untyped_storage().nbytes() for b in buffers), len(optimizer.gradients.buckets)
    optimizer.gradients.zero()
    if mesh.dp.rank == 1:
        optimizer.gradients.flat[3] = float("nan")
    optimizer.gradients.sync()
    found["not finite"] = clip_gradients(optimizer.gradients, 1.0)
    return found


def frozen_stage(mesh: ParallelMesh) -> tuple[float, dict[str, Tensor]]:
    """The second stage trains nothing; the norm is the first one's on both."""
    toy = Toy(torch.float32).requires_grad_(mesh.pp.rank == 0)
    optimizer = MasterAdamW(toy.named(), OptimizerConfig(), mesh, bucket_elements=40, tied=(TIED,))
    if mesh.pp.rank == 0:
        toy.loss(0, {}).backward()
    optimizer.gradients.sync()
    norm = clip_gradients(optimizer.gradients, 0.0)
    optimizer.step(LR)
    return norm, {name: p.detach() for name, p in toy.named_parameters()}


def late_gradient(mesh: ParallelMesh) -> bool:
    """A backward after the last one is an error, not a wrong sum."""
    toy = Toy(torch.float32)
    buffer = GradientBuffer(toy.named(), mesh)
    with buffer.overlap():
        toy.loss(0, {}).backward()
    try:
        toy.loss(0, {}).backward()
    except AssertionError as error:
        return "came after its bucket was reduced" in str(error)
    finally:
        buffer.sync()
    return False


def on_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    meshes: dict[tuple[int, int], ParallelMesh] = {}
    for name, case in CASES.items():
        config = ParallelConfig(**case.parallel)
        degrees = config.tensor, config.pipeline
        meshes[degrees] = meshes.get(degrees) or build_mesh(config, WORLD, rank)
        found[name] = run(case, meshes[degrees])
    mesh = meshes[1, 1]
    found["toys"] = toys(mesh)
    found["late gradient"] = late_gradient(mesh)
    found["frozen stage"] = frozen_stage(meshes[1, 2])
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(WORLD, on_rank)


def reference(case: Case) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters and gradient norms of torch's AdamW on one rank with the whole batch."""
    model = decoder(dtype=case.dtype, **case.sizes)
    groups = [
        {"params": [p], "weight_decay": CONFIG.weight_decay if p.dim() > 1 else 0.0, "lr": LR * lr_scale(name, CONFIG)}
        for name, p in model.named_parameters()
    ]
    adamw, norms = torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps), []
    tokens, labels, mask = batch(size=8)
    for _ in range(STEPS):
        adamw.zero_grad()
        sequence_loss(model, tokens, labels, mask).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_div_(gradients, mask.sum().item())
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        torch._foreach_mul_(gradients, min(1.0, CONFIG.clip_grad / norms[-1]))
        adamw.step()
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def mesh_of(case: Case, rank: int) -> tuple[Axis, Axis]:
    """(pp, tp) of a rank, without groups."""
    tp, pp = case.parallel.get("tensor", 1), case.parallel.get("pipeline", 1)
    return Axis("pp", pp, rank * pp // WORLD), Axis("tp", tp, rank % tp)


@pytest.mark.parametrize("name", CASES)
def test_training_equals_torch_on_one_rank(ranks: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    expected, norms = reference(case)
    assert min(norms) > CONFIG.clip_grad  # so that clipping is seen
    start = {n: p.detach() for n, p in decoder(dtype=case.dtype, **case.sizes).named_parameters()}
    metas = {n: meta for n, _, meta in decoder(**case.sizes).own_parameters()}
    limit = 1e-12 if case.dtype == torch.float64 else 1e-5
    seen = set()
    for rank in range(WORLD):
        found: Found = ranks[rank][name]
        tp = mesh_of(case, rank)[1]
        assert found.norms == ranks[0][name].norms
        assert found.norms == pytest.approx(norms, rel=limit)
        for n, parameter in found.parameters.items():
            seen.add(n)
            assert distance(parameter, metas[n].shard(expected[n], tp)) < limit, n
            assert distance(metas[n].shard(start[n], tp), parameter) > 1e-3, n
    assert seen == expected.keys()


@pytest.mark.parametrize("name", CASES)
def test_copies_stay_equal(ranks: list[dict[str, Any]], name: str) -> None:
    """Of dp ranks, and of tied embeddings on both ends of the pipeline."""
    case = CASES[name]
    holders: dict[tuple[int, str], Tensor] = {}
    for rank in range(WORLD):
        pp, tp = mesh_of(case, rank)
        for n, parameter in ranks[rank][name].parameters.items():
            assert torch.equal(holders.setdefault((tp.rank, n), parameter), parameter), n
    if case.parallel.get("pipeline") and "tie_embeddings" in case.sizes:
        assert sum(TIED in ranks[rank][name].parameters for rank in range(WORLD)) == 2 * WORLD // pp.size


@pytest.mark.parametrize("name", CASES)
def test_shards_tile_the_parameters(ranks: list[dict[str, Any]], name: str) -> None:
    """Of each kind, over the dp ranks; together the masters are the parameters."""
    case = CASES[name]
    lines: dict[tuple[int, int], list[int]] = {}
    for rank in range(WORLD):
        pp, tp = mesh_of(case, rank)
        lines.setdefault((pp.rank, tp.rank), []).append(rank)
    for line in lines.values():
        parameters = ranks[line[0]][name].parameters
        whole = {
            (kind, n): torch.full((p.numel(),), torch.nan, dtype=case.dtype)
            for kind in KINDS
            for n, p in parameters.items()
        }
        for rank in line:
            for kind, n, (first, last), values in ranks[rank][name].shards:
                assert whole[kind, n][first:last].isnan().all()
                whole[kind, n][first:last] = values
        for (kind, n), values in whole.items():
            assert not values.isnan().any()
            assert kind != "master" or torch.equal(values.view_as(parameters[n]), parameters[n])


@pytest.mark.parametrize("name", CASES)
def test_buckets_are_reduced_in_order_and_during_the_last_backward_only(ranks: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    dp = WORLD // math.prod(degree for axis, degree in case.parallel.items() if axis != "sequence")
    for rank in range(WORLD):
        found: Found = ranks[rank][name]
        launched = [begin for what, begin in found.events if what == "bucket"]
        if dp == 1:
            assert launched == []
            continue
        assert launched == sorted(set(launched)) * STEPS
        assert len(launched) == found.num_buckets * STEPS
        place, during = "", {"backward": 0, "last backward": 0, "sync": 0}
        for what, _ in found.events:
            place = place if what == "bucket" else what
            during[place] += what == "bucket"
        assert during["backward"] == 0
        if case.bucket == 1:
            assert during["sync"] == 0
            assert found.num_buckets == len(found.parameters)
        elif found.num_buckets > 1:
            assert during["last backward"] >= STEPS
            assert (during["sync"] >= STEPS) == ("tensor" in case.parallel)  # late buckets


def toy_sums() -> dict[str, Tensor]:
    """Sums over the ranks of the toy's gradients."""
    sums = {f"weights.{i}": torch.zeros(shape) for i, shape in enumerate(Toy.shapes)}
    for rank in range(WORLD):
        for i in set(range(len(Toy.shapes))) - UNUSED.get(rank, set()):
            sums[f"weights.{i}"] += rank + i + 1
    return sums


def test_parameters_without_a_gradient_on_some_ranks(ranks: list[dict[str, Any]]) -> None:
    """The sums are those of the ranks that have one, in spite of another order of gradients on every second rank."""
    for dtype in ("torch.float32", "torch.bfloat16"):
        found = {name: torch.full((x.numel(),), torch.nan) for name, x in toy_sums().items()}
        for rank in range(WORLD):
            _, shards, gradients = ranks[rank]["toys"][dtype]
            for kind, name, (first, last), _ in shards:
                if kind == "master":
                    found[name][first:last] = gradients[name]
        for name, expected in toy_sums().items():
            assert torch.equal(found[name].view_as(expected), expected), name


def test_low_precision_parameters_are_written_from_the_masters(ranks: list[dict[str, Any]]) -> None:
    toy = Toy(torch.bfloat16).float()
    named = dict(toy.named_parameters())
    decay = OptimizerConfig().weight_decay
    groups = [{"params": [p], "weight_decay": decay if p.dim() > 1 else 0.0} for p in named.values()]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=OptimizerConfig().eps)
    for _ in range(STEPS):
        for name, total in toy_sums().items():
            named[name].grad = total.clone()
        adamw.step()
    for rank in range(WORLD):
        parameters, shards, _ = ranks[rank]["toys"]["torch.bfloat16"]
        for kind, name, (first, last), values in shards:
            if kind == "master":
                torch.testing.assert_close(values, named[name].detach().view(-1)[first:last])
                assert torch.equal(parameters[name].view(-1)[first:last], values.bfloat16())
        for name, parameter in parameters.items():
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, ranks[0]["toys"]["torch.bfloat16"][0][name])


def test_each_rank_holds_its_share_of_the_state(ranks: list[dict[str, Any]]) -> None:
    """12 bytes for each of P / dp elements, but for the padding of every bucket."""
    num_elements = sum(p.numel() for p in Toy(torch.bfloat16).parameters())
    for rank in range(WORLD):
        found, num_buckets = ranks[rank]["toys"]["bytes"]
        assert 0 <= found - 12 * num_elements / WORLD < 12 * num_buckets * 32


def test_what_is_not_finite_on_one_rank_is_so_on_all(ranks: list[dict[str, Any]]) -> None:
    assert all(math.isnan(rank["toys"]["not finite"]) for rank in ranks)


def test_a_stage_that_trains_nothing(ranks: list[dict[str, Any]]) -> None:
    toy = Toy(torch.float32)
    toy.loss(0, {}).backward()
    norm = 2 * torch.nn.utils.get_total_norm([p.grad for p in toy.parameters() if p.grad is not None]).item()
    for rank in range(WORLD):
        found, parameters = ranks[rank]["frozen stage"]
        assert found == pytest.approx(norm)  # twice: two dp ranks with the same gradients
        moved = [not torch.equal(parameters[name], p) for name, p in toy.named_parameters()]
        assert moved == [rank < 2] * len(moved)


def test_a_gradient_after_the_last_is_an_error(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["late gradient"] for rank in ranks)
