"""One rank's stages of a model: losses of micro-batches, run through the pipeline.

With one pipeline rank it is the whole model, by the same code.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megabts.config.run import ParallelConfig
from megabts.data.loader import Batch
from megabts.evaluation.perplexity import to_device
from megabts.model.attention import Context, make_context
from megabts.model.decoder import Model
from megabts.parallel.collectives import all_reduce, gather_objects
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.pipeline import Pipeline
from megabts.parallel.sharding import name_seed


class Stages:
    """The stages of `model` on this rank, and their place in the pipeline. Every rank must build it."""

    def __init__(
        self,
        model: Model,
        mesh: ParallelMesh,
        config: ParallelConfig,
        device: torch.device,
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.device = device
        self.pipeline = Pipeline(
            mesh.pp,
            _needs_backward(model, mesh),
            schedule=config.schedule,
            chunks=len(model.part.chunks),
            dtype=model.dtype,
            device=device,
        )

    def losses(
        self,
        batches: Sequence[Batch],
        seed: int | None = None,
        *,
        step: int = 0,
        backward: bool,
        last_backward: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Tensor:
        """Sum of the cross-entropy of each micro-batch, nats, float64 [micro-batches], on the rank that has the loss.

        Elsewhere zeros: summed over the pipeline and expert axes they are the losses. `seed` decides dropout masks
        and routers' noise (None: neither), whose temperature falls with `step`. `last_backward`: see `Pipeline.run`.
        """

        def forward(chunk: int, microbatch: int, hidden: Tensor | None) -> Tensor:
            return self.forward(chunk, batches[microbatch], hidden, seed, step)

        def wire_shape(boundary: int, microbatch: int) -> tuple[int, ...]:
            size, length = batches[microbatch].tokens.shape
            return self.model.wire_shape(self.model.part.cuts[boundary], length, size)

        return self.pipeline.run(len(batches), forward, wire_shape, backward=backward, last_backward=last_backward)

    def forward(self, chunk: int, batch: Batch, hidden: Tensor | None, seed: int | None, step: int) -> Tensor:
        """One of this rank's stages on one micro-batch: from tokens (None) or hidden, to hidden or the loss."""
        model, layers = self.model, self.model.part.chunks[chunk]
        if hidden is None:
            hidden = model.embed(to_device(batch.tokens, self.device))
        context = self._context(batch, seed, step)
        hidden = model.run_layers(layers.start, layers.stop, hidden, context)
        if model.part.head and chunk == len(model.part.chunks) - 1:
            labels, mask = to_device(batch.labels, self.device), to_device(batch.loss_mask, self.device)
            return model.loss(hidden, labels, mask, context)
        return hidden

    def _context(self, batch: Batch, seed: int | None, step: int) -> Context:
        """A sample's number and `seed` decide its random numbers, whatever rank it is on."""
        size, length = batch.tokens.shape
        samples = range(batch.first_sample, batch.first_sample + size)
        return make_context(
            self.model.config,
            torch.arange(length, device=self.device),
            self.model.dtype,
            document_ids=None if batch.document_ids is None else to_device(batch.document_ids, self.device),
            dropout_seeds=None if seed is None else [name_seed(f"sample {sample}", seed) for sample in samples],
            step=step,
        )

    def total(self, losses: Tensor) -> Tensor:
        """`losses`, or their sum, from the ranks that have them to every rank of the pipeline and expert axes."""
        return all_reduce(all_reduce(losses, self.mesh.pp), self.mesh.ep)


def _needs_backward(model: Model, mesh: ParallelMesh) -> list[bool]:
    """Of every virtual stage: whether anything in it or before it trains, on any rank."""
    mine = [model.trains(layers) for layers in model.part.chunks]
    found = gather_objects((mesh.pp.rank, mine))
    stages = [
        any(flags[chunk] for rank, flags in found if rank == place)
        for chunk in range(len(mine))
        for place in range(mesh.pp.size)
    ]
    return [any(stages[: stage + 1]) for stage in range(len(stages))]
