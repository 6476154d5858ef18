"""BTS models on ranks and on one, with the same weights, for comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megabts.bts.flow import needs_gradient
from megabts.bts.gates import record_gates
from megabts.bts.model import BTSModel
from megabts.inference.generate import complete, requests
from megabts.inference.settings import GenerationSettings
from megabts.model.attention import Context, make_context
from megabts.model.part import Part
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from tests.bts.reference import config_of, random_model

TOKENS = torch.tensor([[3, 7, 1, 30, 12, 4], [0, 29, 5, 5, 18, 2]])
LABELS = torch.tensor([[7, 1, 30, 12, 4, 9], [29, 5, 5, 18, 2, 11]])
MASK = torch.tensor([[1.0, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 0]])
PROMPTS = [[3, 7, 1], [4], [9, 30, 2, 2]]
SEEDS = [11, 12]


@dataclass(frozen=True)
class Case:
    """A model and how its members meet."""

    experts: int
    settings: dict[str, Any] = field(default_factory=dict)
    exchange: str = "auto"
    recompute: str = "none"
    frozen: torch.dtype | None = None
    """Of the members; stitches are then in float64, else all is in float32."""
    parts: tuple[Part, ...] = ()
    """Run as these parts, whose chunks together are all layers, one after the other; (): whole."""


@dataclass
class Outcome:
    """What one rank found; gradients by name."""

    loss: Tensor
    gradients: dict[str, Tensor]
    logits: Tensor
    gates: dict[int, Tensor]


def whole_model(case: Case) -> BTSModel:
    """The case's model on one rank: the oracle."""
    config = config_of(case.experts, **{"num_stitch_layers": 3, **case.settings})
    return random_model(config, _dtype(case), frozen=case.frozen)


def _dtype(case: Case) -> torch.dtype:
    return torch.float64 if case.frozen else torch.float32


def local_model(case: Case, mesh: ParallelMesh, sequence: bool = False, part: Part | None = None) -> BTSModel:
    """This rank's slice of `whole_model`: the same weights."""
    whole = whole_model(case)
    weights = dict(whole.named_parameters())
    backend = TorchBackend(_dtype(case), "cpu", mesh.tp, sequence, frozen=case.frozen)
    model = BTSModel(
        whole.config,
        whole.bts,
        backend,
        ep=mesh.ep,
        part=part,
        exchange=case.exchange,  # type: ignore[arg-type]
        recompute=case.recompute,  # type: ignore[arg-type]
    )
    metas = {
        f"{prefix}.{leaf}": meta
        for prefix, module in model.named_modules()
        for leaf, meta in getattr(module, "metas", {}).items()
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(metas[name].shard(weights[name], mesh.tp))
    return model


def outcome(model: BTSModel, parts: Sequence[BTSModel] = ()) -> Outcome:
    """Loss and gradients of training the model, or its parts; logits and gates of evaluating the model."""
    model.train()
    loss = train_parts(parts) if parts else train(model)
    gradients = {
        name: parameter.grad
        for part in parts or [model]
        for name, parameter, _ in part.own_parameters()
        if parameter.grad is not None
    }
    model.eval()
    with record_gates(model) as record, torch.no_grad():
        logits = model.logits(model.run_layers(0, model.config.num_layers, model.embed(TOKENS), _context(model)))
    return Outcome(loss, gradients, logits, {index: gates[0] for index, gates in record.places.items()})


def train(model: BTSModel) -> Tensor:
    """Loss of one pass; the gradients are left on the parameters."""
    context = _context(model, SEEDS)
    loss = model.loss(model.run_layers(0, model.config.num_layers, model.embed(TOKENS), context), LABELS, MASK)
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def train_parts(parts: Sequence[BTSModel]) -> Tensor:
    """`train` as a pipeline does it: between two chunks pass one tensor and, back, its gradient."""
    context = _context(parts[0], SEEDS)
    stages = sorted((chunk.start, chunk.stop, number) for number, p in enumerate(parts) for chunk in p.part.chunks)
    hidden = next(part for part in parts if part.part.embedding).embed(TOKENS)
    wires = []
    for first, last, number in stages:
        received = hidden.detach().requires_grad_(hidden.requires_grad)
        hidden = parts[number].run_layers(first, last, received, context)
        assert tuple(hidden.shape) == parts[number].wire_shape(last, TOKENS.shape[1], len(TOKENS))
        assert hidden.requires_grad == bool(needs_gradient(parts[0].flows, last)), (first, last)
        wires.append((received, hidden))
    loss = next(part for part in parts if part.part.head).loss(hidden, LABELS, MASK)
    if not loss.requires_grad:
        return loss
    loss.backward()
    for (received, _), (_, sent) in zip(wires[:0:-1], wires[-2::-1], strict=True):
        if sent.requires_grad:
            sent.backward(received.grad)
    return loss.detach()


def _context(model: BTSModel, seeds: list[int] | None = None) -> Context:
    return make_context(model.config, torch.arange(TOKENS.shape[1]), model.dtype, dropout_seeds=seeds)


def generated(model: BTSModel, mesh: ParallelMesh) -> list[list[int]]:
    """Greedy completions of prompts of several lengths, over caches; [] on ranks that follow the first."""
    asked = requests(PROMPTS, GenerationSettings(max_new_tokens=4))
    return [completion.tokens for completion in complete(model, asked, mesh=mesh)]
