"""What the planner says of one rank of one layout, and what that rank really holds and sends."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabts.build import BUILDERS, make_backend, stage_cuts
from megabts.config.load import load_config
from megabts.config.run import RunConfig
from megabts.data.loader import Batch
from megabts.model import torch_backend
from megabts.parallel.balance import stages_with_backward
from megabts.parallel.layout import num_microbatches
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.planner.gpus import Cluster
from megabts.planner.memory import Memory, rank_memory
from megabts.planner.methods import METHODS
from megabts.planner.step_time import Traffic, timed
from megabts.planner.work import state_bytes
from megabts.runtime.device import DTYPES
from megabts.train.stages import Stages

Arguments = dict[str, Any]
SMALL: Arguments = {
    "model.vocab_size": 96,
    "model.hidden_size": 64,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_size": 160,
    "data.seq_length": 128,
    "train.micro_batch": 2,
    "train.global_batch": 8,
}
"""A dense model that real ranks train in a moment."""


def configured(settings: Arguments) -> RunConfig:
    """{"parallel.tensor": 2, ..} as a configuration."""
    return load_config([f"--{key}={value!s}" for key, value in settings.items()])


def predicted(config: RunConfig, mesh: ParallelMesh) -> Memory:
    """The planner's figures for this rank."""
    method = METHODS[config.method]
    parts = method.parts(config, mesh.ep.rank)
    cuts = stage_cuts(config, mesh.dp.size)
    needs = stages_with_backward(method.costs(config).of_stages(cuts))
    count = num_microbatches(config, mesh.dp.size)
    works = parts.stages(cuts, state_bytes(config))
    shared = mesh.experts.size
    return rank_memory(config, parts, works, needs, count, mesh.dp.size // shared, mesh.pp.rank, shared)


def mesh_of(config: RunConfig, world: int, rank: int) -> ParallelMesh:
    """The mesh as the run's model sees it."""
    mesh = build_mesh(config.parallel, world, rank)
    return mesh.routed if config.method == "moe" else mesh


class Saved:
    """Bytes of what autograd keeps, unique storages outside the parameters: those of now, and the most so far."""

    def __init__(self, parameters: Iterator[Tensor]) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.holders: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def hold(self, owner: object, tensor: Tensor) -> None:
        """`tensor` is kept for as long as `owner` lives."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.parameters and storage.nbytes():
            self.holders[place] += 1
            self.sizes[place] = storage.nbytes()
            weakref.finalize(owner, self._drop, place)
            self.peak = max(self.peak, sum(self.sizes.values()))

    def _drop(self, place: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.sizes[place]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, count."""

        class Box:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        def pack(tensor: Tensor) -> Box:
            box = Box(tensor)
            self.hold(box, tensor)
            return box

        with saved_tensors_hooks(pack, lambda box: box.tensor):
            yield


class Sent(TorchDispatchMode):
    """Bytes that one of two ranks sends inside: in ring collectives, and from rank to rank (received ones, too).

    What is smaller than 1 KiB is left out.
    """

    ROUNDS: ClassVar = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}

    def __init__(self) -> None:
        super().__init__()
        self.rings = self.sent = self.received = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            nbytes = max((x.numel() * x.element_size() for x in tensors), default=0)  # the whole of a collective
            if nbytes >= 1024:
                self.rings += self.ROUNDS.get(name, 0) / 2 * nbytes
                self.sent += nbytes * (name == "send")
                self.received += nbytes * (name == "recv_")
        return func(*args, **(kwargs or {}))


def predicted_traffic(config: RunConfig, mesh: ParallelMesh) -> Traffic:
    """What the planner says the busiest rank sends in a step."""
    method, parallel = METHODS[config.method], config.parallel
    cuts, count = stage_cuts(config, mesh.dp.size), num_microbatches(config, mesh.dp.size)
    ranks = [method.parts(config, ep_rank) for ep_rank in range(parallel.expert)]
    state = state_bytes(config)
    works, costs = [parts.stages(cuts, state) for parts in ranks], method.costs(config).of_stages(cuts)
    message = max(parts.states for parts in ranks) * state
    shared = mesh.experts.size
    dp = mesh.dp.size // shared
    return timed(config, Cluster.of("h100", 2, 1), works, costs, message, count, dp, shared_dp=shared).traffic


def batches_of(config: RunConfig, dp: int) -> list[Batch]:
    """One step's micro-batches of this rank, of any tokens."""
    size, length = config.train.micro_batch, config.data.seq_length
    tokens = np.arange(size * length).reshape(size, length) % config.model.vocab_size
    ones = np.ones((size, length), dtype=np.float32)
    return [Batch(tokens, tokens, ones, None, index * size) for index in range(num_microbatches(config, dp))]


Figures = dict[str, dict[str, tuple[float, float]]]
"""By case and figure: (real, planned)."""


def figures_of_steps(rank: int, world: int, cases: list[tuple[str, Arguments]]) -> Figures:
    """Of this rank: the most bytes that autograd kept in a step, and those it sent."""
    found: Figures = {}
    for name, settings in cases:
        config = configured(settings)
        mesh = mesh_of(config, world, rank)
        saved, sent = one_step(config, mesh)
        traffic = predicted_traffic(config, mesh)
        found[name] = {
            "kept": (float(saved.peak), predicted(config, mesh).activations),
            "rings": (sent.rings, traffic.tp),
            "sent": (sent.sent, traffic.pp),
            "sent and received": (sent.sent + sent.received, traffic.ep),
        }
    return found


def one_step(config: RunConfig, mesh: ParallelMesh) -> tuple[Saved, Sent]:
    """Forward and backward of all of a step's micro-batches, with the attention kernel that GPUs have too."""
    model = BUILDERS[config.method](config, mesh, make_backend(config, mesh, DTYPES[config.precision.dtype], "cpu"))
    torch.manual_seed(1)  # routers of all tensor-parallel ranks are equal
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    stages = Stages(model, mesh, config.parallel, torch.device("cpu"))
    saved, sent = Saved(model.parameters()), Sent()
    run_layers = model.run_layers

    def watched(first: int, last: int, hidden: Tensor, *rest: Any) -> Tensor:
        if torch.is_grad_enabled() and first > 0:
            saved.hold(hidden, hidden)  # the pipeline keeps what it received
        return run_layers(first, last, hidden, *rest)

    model.run_layers = watched  # type: ignore[method-assign]
    kernel = patch.object(torch_backend, "_explicit_is_faster", lambda query, key: False)
    with kernel, saved.watching(), sent:
        stages.losses(batches_of(config, mesh.dp.size), 1, backward=True)
    return saved, sent
