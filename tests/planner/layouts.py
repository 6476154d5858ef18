"""What the planner says of one rank of one layout, and what that rank really holds."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megabts.build import BUILDERS, make_backend, stage_cuts
from megabts.config.load import load_config
from megabts.config.run import RunConfig
from megabts.data.loader import Batch
from megabts.parallel.balance import stages_with_backward
from megabts.parallel.layout import num_microbatches
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.planner.memory import Memory, rank_memory
from megabts.planner.methods import METHODS
from megabts.planner.work import state_bytes
from megabts.runtime.device import DTYPES
from megabts.train.stages import Stages

Arguments = dict[str, Any]


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
    return rank_memory(config, parts, works, needs, count, mesh.dp.size, mesh.pp.rank)


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


def batches_of(config: RunConfig, dp: int) -> list[Batch]:
    """One step's micro-batches of this rank, of any tokens."""
    size, length = config.train.micro_batch, config.data.seq_length
    tokens = np.arange(size * length).reshape(size, length) % config.model.vocab_size
    ones = np.ones((size, length), dtype=np.float32)
    return [Batch(tokens, tokens, ones, None, index * size) for index in range(num_microbatches(config, dp))]


def kept_in_steps(rank: int, world: int, cases: list[tuple[str, Arguments]]) -> dict[str, tuple[float, float]]:
    """{case: (most bytes that autograd really kept in a step, the planner's)} on this rank."""
    found = {}
    for name, settings in cases:
        config = configured(settings)
        mesh = build_mesh(config.parallel, world, rank)
        found[name] = (kept_in_step(config, mesh), predicted(config, mesh).activations)
    return found


def kept_in_step(config: RunConfig, mesh: ParallelMesh) -> float:
    """The most bytes that autograd keeps on this rank in a step."""
    model = BUILDERS[config.method](config, mesh, make_backend(config, mesh, DTYPES[config.precision.dtype], "cpu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    stages = Stages(model, mesh, config.parallel, torch.device("cpu"))
    saved = Saved(model.parameters())
    run_layers = model.run_layers

    def watched(first: int, last: int, hidden: Tensor, *rest: Any) -> Tensor:
        if torch.is_grad_enabled() and first > 0:
            saved.hold(hidden, hidden)  # the pipeline keeps what it received
        return run_layers(first, last, hidden, *rest)

    model.run_layers = watched  # type: ignore[method-assign]
    with saved.watching():
        stages.losses(batches_of(config, mesh.dp.size), 1, backward=True)
    return float(saved.peak)
