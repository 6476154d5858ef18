"""What the contestants of the GPU suite do in a round: training steps of presets, a plain one beside them, decoding."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megabts.benchmark.contestants import Round
from megabts.benchmark.decode import decoding_round
from megabts.benchmark.shapes import NUM_EXPERTS, stitching
from megabts.bts.flops import bts_flops
from megabts.bts.model import BTSModel
from megabts.bts.placement import ALONE, Exchanges
from megabts.bts.plan import stitch_plan
from megabts.build import make_backend
from megabts.config.model import PRESETS, ModelConfig
from megabts.config.run import ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from megabts.data.loader import Batch
from megabts.errors import UserError
from megabts.evaluation.perplexity import to_device
from megabts.model.attention import make_context
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.model.flops import dense_flops
from megabts.optimizer.adamw import MasterAdamW
from megabts.optimizer.clip import clip_gradients
from megabts.optimizer.stability import SpikeGuard
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import named_metas
from megabts.runtime.device import DTYPES, synchronize
from megabts.runtime.fusion import can_compile, compiled, eager
from megabts.runtime.progress import Progress
from megabts.train.stages import Stages
from megabts.train.step import train_step

NUM_STITCH_LAYERS = 4
"""The paper's (arXiv 2502.00075, section 3.1)."""


@dataclass(frozen=True)
class Work:
    """A training step: one optimizer step over `sequences` of `length` tokens, in micro-batches."""

    place: str
    """In the results."""
    model: ModelConfig
    stitched: bool
    """A hub and NUM_EXPERTS experts of this shape with NUM_STITCH_LAYERS stitch layers, else the dense model."""
    length: int = 4096
    sequences: int = 8

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    def operations(self, *, causal: bool = True) -> float:
        """Model operations of a step."""
        if not self.stitched:
            return self.tokens * dense_flops(self.model, self.length, causal=causal).total
        bts = stitching(self.model, NUM_EXPERTS, NUM_STITCH_LAYERS)
        plan = stitch_plan(self.model.num_layers, bts)
        return self.tokens * bts_flops(self.model, bts, self.length, plan, causal=causal).total


def preset(name: str) -> ModelConfig:
    """A model of `config.model`, by name."""
    return ModelConfig(preset=name, **PRESETS[name])


def make_model(config: ModelConfig, stitched: bool, backend: Backend) -> Decoder | BTSModel:
    """As `Work` says; without values on device meta, else with random ones."""
    model: Decoder | BTSModel
    if stitched:
        model = BTSModel(config, stitching(config, NUM_EXPERTS, NUM_STITCH_LAYERS), backend)
    else:
        model = Decoder(config, backend)
    if backend.device.type != "meta":
        _fill(model)
    return model


@torch.no_grad()
def _fill(model: Decoder | BTSModel) -> None:
    """Values like those at the start of training, drawn where they are: `initialise` draws on CPU, for minutes."""
    torch.manual_seed(0)
    for name, parameter, meta in named_metas(model):
        if meta.init == "normal":  # copied, since weights that are kept in FP8 cannot be drawn
            drawn = torch.empty(meta.shape, dtype=model.dtype, device=parameter.device)
            parameter.copy_(drawn.normal_(0.0, meta.value))
        else:
            parameter.copy_(meta.initial(name, 0))


def make_round(work: Work, precision: PrecisionConfig, device: torch.device, micro_batch: int) -> Round:
    """Our training step, element-wise work compiled. A round raises UserError when its step was skipped."""
    mesh, dtype = ParallelMesh(), DTYPES[precision.dtype]
    config = RunConfig(train=TrainConfig(steps=1000), precision=precision)
    backend = make_backend(config, mesh, dtype, device, compiled if can_compile(device) else eager)
    model = make_model(work.model, work.stitched, backend)
    optimizer = MasterAdamW(model.own_parameters(), config.optimizer, mesh, device=device)
    stages = Stages(model, mesh, ParallelConfig(), device)
    guard, progress, steps = SpikeGuard(), Progress(), iter(range(1000))
    batches = make_batches(work, micro_batch)

    def run() -> None:
        result = train_step(stages, optimizer, guard, batches, next(steps), config, progress)
        synchronize(device)
        if result.skipped:
            raise UserError(f"a step did not train: {result.skipped}")

    return run


def make_plain_round(work: Work, precision: PrecisionConfig, device: torch.device, micro_batch: int) -> Round:
    """The stitched step with `plain_loss`, and the same optimizer."""
    config, mesh = RunConfig(precision=precision), ParallelMesh()
    model = make_model(work.model, True, make_backend(config, mesh, DTYPES[precision.dtype], device))
    assert isinstance(model, BTSModel)
    optimizer = MasterAdamW(model.own_parameters(), config.optimizer, mesh, device=device)
    batches = make_batches(work, micro_batch)

    def run() -> None:
        optimizer.gradients.zero()
        for batch in batches:
            tokens, labels = to_device(batch.tokens, device), to_device(batch.labels, device)
            seeds = range(batch.first_sample, batch.first_sample + micro_batch)
            (plain_loss(model, tokens, labels, seeds) / len(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.gradients.sync()
        clip_gradients(optimizer.gradients, config.optimizer.clip_grad)
        optimizer.step(config.optimizer.lr)
        synchronize(device)

    return run


def plain_loss(model: BTSModel, tokens: Tensor, labels: Tensor, seeds: range) -> Tensor:
    """Mean cross-entropy, nats, of a stitched model as PyTorch computes it when nobody thinks of its frozen members.

    tokens, labels [b, s]; seeds: of the samples' gate dropout. Members' weights do not train here either. Left out is
    what our step does for speed: layers that nothing trainable stands before run outside autograd, the loss is formed
    without all logits, element-wise work is compiled. Here all layers pass gradient, down to the embeddings; logits
    [b, s, V] exist at one time, and in float32 once more; every function runs eagerly. In its favour it has our layers
    and stitches, whose norms, SwiGLU and mixing have a backward of their own, with fewer passes over memory than
    autograd's composition of them.
    """
    assert model.output is None, "the paper's output is the hub's"
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    context = make_context(model.config, positions, model.dtype, dropout_seeds=seeds)
    members = [member for member in model.members.values() if isinstance(member, Decoder)]
    states = [member.embed(tokens).requires_grad_() for member in members]
    begin, exchanges = 0, Exchanges(ALONE)
    for index, point in enumerate(model.plan):
        states = [
            member.run_layers(begin, point.after, state, context) for member, state in zip(members, states, strict=True)
        ]
        states, begin = model.stitch(index, states, context, exchanges), point.after
    logits = model.hub.logits(states[0])
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def make_decoding_round(
    config: ModelConfig,
    precision: PrecisionConfig,
    device: torch.device,
    prompt: int,
    new: int,
    cuda_graphs: bool,
    batch: int,
) -> Round:
    """The stitched model generates `new` tokens for each of `batch` prompts; a round returns all steps' seconds but
    the first's, which reads the prompts."""
    backend = make_backend(RunConfig(precision=precision), ParallelMesh(), DTYPES[precision.dtype], device)
    model = make_model(config, True, backend)
    return decoding_round(model, batch, prompt, new, cuda_graphs=cuda_graphs)


def make_batches(work: Work, micro_batch: int) -> list[Batch]:
    """A step's micro-batches of random tokens."""
    assert work.sequences % micro_batch == 0
    size = (work.sequences, work.length + 1)
    tokens = np.random.default_rng(0).integers(work.model.vocab_size, size=size)
    mask = np.ones((micro_batch, work.length), np.float32)
    return [
        Batch(tokens[first : first + micro_batch, :-1], tokens[first : first + micro_batch, 1:], mask, None, first)
        for first in range(0, work.sequences, micro_batch)
    ]
